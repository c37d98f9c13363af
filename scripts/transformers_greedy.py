"""Writes transformers' greedy answers to some questions, as the reference of `make test-real`.

    python scripts/transformers_greedy.py build/smollm2 questions.jsonl.gz build/smollm2/greedy.json

float32 on the CPU, chat template applied. The output is a JSON list, one object a question:
`problem`, `prompt_ids`, `token_ids` (generated, with the end-of-turn token if it came) and
`margins` (best logit minus second best, where each token was chosen).
"""

import argparse
import gzip
import itertools
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("questions", type=Path, help="JSON lines with `problem`, gzipped")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--count", type=int, default=10, help="questions to take")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with gzip.open(args.questions, "rt", encoding="utf-8") as file:
        problems = [json.loads(line)["problem"] for line in itertools.islice(file, args.count)]

    answers = []
    for problem in problems:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=args.tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        prompt_ids = inputs["input_ids"][0].tolist()
        best = torch.stack(output.logits)[:, 0].topk(2).values
        answers.append(
            {
                "problem": problem,
                "prompt_ids": prompt_ids,
                "token_ids": output.sequences[0, len(prompt_ids) :].tolist(),
                "margins": (best[:, 0] - best[:, 1]).tolist(),
            }
        )
    args.out.write_text(json.dumps(answers), encoding="utf-8")
    smallest = min(min(answer["margins"]) for answer in answers)
    print(f"{args.out}: {len(answers)} answers, smallest margin {smallest:.2g}")


if __name__ == "__main__":
    main()
