"""Compiles the attention kernels for one TPU chip, on a machine that has none.

    pip install libtpu
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python bench/compile_kernels.py

Writes bench/results/compile_kernels.json: per kernel and shape the seconds of compilation, the
bytes of the chip's memory that the compiler plans beside the arguments and the result, and the
least vector memory (VMEM) that it says is enough. Nothing is run.
"""

import datetime
import json
import time
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

from npr_jax.decode import attention_tpu
from npr_jax.model import PRESETS

MODEL = "qwen3-4b"
CONTEXT, POOL_TOKENS = 16384, 2**16
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KERNELS = {"paged": attention_tpu.paged_attention, "stock": attention_tpu.plain_attention}
SHAPES = {"decode": (64, 1), "prefill": (4, 128)}
PAGE_SIZES = (16, 64)
