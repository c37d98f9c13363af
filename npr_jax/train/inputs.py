"""What the inputs of a run hold, told apart wherever they lie."""

import hashlib
import json
from collections.abc import Sequence

from npr_jax.data.problems import Problem
from npr_jax.model import PRESETS
from npr_jax.model.pretrained import Model
from npr_jax.train.rollout_cache import fingerprint


def model_content(source: str, model: Model) -> str:
    """The weights of a loaded model, and YaRN, which is turned on for the same weights; a preset is
    told by its name (and the run's seed)."""
    if source in PRESETS:
        return f"preset {source}"
    content, yarn = f"weights {fingerprint(model.params):08x}", model.config.yarn
    return f"{content} {json.dumps(yarn.to_hf())}" if yarn else content


def problems_content(
    problems: Sequence[Problem], prompts: Sequence[Sequence[int]], levels: bool = False
) -> str:
    """Problems as they are asked, and their answers; on request their levels too."""
    digest = hashlib.sha256()
    for problem, prompt in zip(problems, prompts, strict=True):
        level = [problem.level] if levels else []
        digest.update(json.dumps([list(map(int, prompt)), problem.answer, *level]).encode())
    return f"problems {digest.hexdigest()[:16]}"
