"""Writes the logits of transformers and PEFT with adapters, as a reference of `make test-real`.

    python scripts/peft_logits.py MODEL ADAPTER IDS OUT [--make]

float32 on the CPU. MODEL and ADAPTER are directories, IDS a JSON list of lists of token ids, all as
long as each other, and OUT the .npy file f32[B, T, vocabulary]. With --make PEFT makes ADAPTER
first: random ones, rank-stabilised, for some of the matrices.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "adapter", "ids", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--make", action="store_true", help="make ADAPTER, at random")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    )
    if args.make:
        torch.manual_seed(0)
        targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
        config = LoraConfig(
            r=5, lora_alpha=7, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM"
        )
        made = get_peft_model(model, config)
        for name, weight in made.named_parameters():
            if "lora_B" in name:  # which begins as 0
                torch.nn.init.normal_(weight, std=0.05)
        made.save_pretrained(args.adapter)
    else:
        made = PeftModel.from_pretrained(model, args.adapter)
    ids = torch.tensor(json.loads(args.ids.read_text(encoding="utf-8")))
    with torch.inference_mode():
        logits = made.eval()(ids).logits
        with made.disable_adapter():
            plain = made(ids).logits
    assert (logits - plain).abs().max() > 0.1, "the adapters do nothing"
    np.save(args.out, logits.numpy())


if __name__ == "__main__":
    main()
