"""Writes what transformers computes with YaRN, as the golden data of tests/test_yarn.py.

    .venv-real/bin/python scripts/transformers_yarn.py tests/data/golden

float32 on the CPU, eager attention, with the random weights of golden/qwen3_tiny/a_tied_h4kv2.
Needs torch and transformers: `make test-real` sets up a virtual environment that has them. Of each
case the file has `config` (keys of config.json), `scale`, `frequencies`, `token_ids`, `positions`,
and `rows`, the tokens of which `logits` are kept, to 6 places.
"""

import argparse
import json
import lzma
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

MODEL = "qwen3_tiny/a_tied_h4kv2"
SHORT = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# Both keys and both names of the type; every field off its default once.
CONFIGS = [
    {"rope_scaling": SHORT},
    {"rope_scaling": {"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 100}},
    {"rope_theta": 1e4, "rope_scaling": SHORT | {"beta_fast": 3, "beta_slow": 0.25}},
    {"rope_theta": 1e4, "rope_scaling": SHORT | {"beta_fast": 5.5, "truncate": False}},
    {"rope_parameters": SHORT | {"rope_theta": 1e4, "mscale": 1.5, "mscale_all_dim": 0.5}},
    {"rope_parameters": SHORT | {"rope_theta": 1e4, "mscale": 1.5}},  # alone it does nothing
    {"rope_parameters": SHORT | {"rope_theta": 1e4, "attention_factor": 1.25}},
    {"rope_scaling": CARD, "max_position_embeddings": 40960},
]
# Of the published models, of which only the angles are compared.
PUBLISHED = {"head_dim": 128, "rope_theta": 1e6, "rope_scaling": CARD}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("golden", type=Path, help="the folder of golden data")
    golden = parser.parse_args().golden
    rng, cases = np.random.default_rng(0), []
    for changes in [*CONFIGS, PUBLISHED]:
        with tempfile.TemporaryDirectory() as name:
            directory = unpack(golden / MODEL, Path(name), changes)
            config = AutoConfig.from_pretrained(directory)
            frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
            case = {"config": changes, "scale": scale, "frequencies": frequencies.tolist()}
            if changes is not PUBLISHED:
                case |= scored(directory, config, rng)
            cases.append(case)
    text = json.dumps({"model": MODEL, "cases": cases}).encode()
    (golden / "yarn.json.xz").write_bytes(lzma.compress(text, preset=9))


def unpack(source: Path, directory: Path, changes: dict) -> Path:
    """The model as a directory, with another config.json."""
    config = json.loads((source / "config.json").read_text())
    if "rope_parameters" in changes:
        del config["rope_theta"], config["rope_scaling"]
    config |= {"max_position_embeddings": 64} | changes
    (directory / "config.json").write_text(json.dumps(config))
    weights = lzma.decompress((source / "model.safetensors.xz").read_bytes())
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def scored(directory: Path, config, rng: np.random.Generator) -> dict:
    """Tokens before, across and beyond the original length, and logits of some of them."""
    length = config.rope_parameters["original_max_position_embeddings"]
    end = round(length * config.rope_parameters["factor"])
    if end < 1000:
        positions = np.arange(end)
        rows = [1, length // 2, length - 1, length, length + 1, (length + end) // 2, end - 1]
    else:  # in three pieces, as a whole line of it would take long
        starts = (0, length - 16, end - 32)
        positions = np.concatenate([np.arange(start, start + 32) for start in starts])
        rows = [1, 31, 47, 48, 63, 64, 95]
    token_ids = rng.integers(config.vocab_size, size=len(positions))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    causal = np.triu(np.full((len(positions),) * 2, np.finfo(np.float32).min, np.float32), 1)
    with torch.inference_mode():
        out = model(
            input_ids=torch.tensor(token_ids[None]),
            position_ids=torch.tensor(positions[None]),
            attention_mask=torch.tensor(causal[None, None]),
        )
    return {
        "token_ids": token_ids.tolist(),
        "positions": positions.tolist(),
        "rows": rows,
        "logits": np.round(out.logits[0, rows].numpy().astype(float), 6).tolist(),
    }


if __name__ == "__main__":
    main()
