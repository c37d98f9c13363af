"""What config.json says of rotary positions: theta, and YaRN.

YaRN (arXiv 2309.00071) reads positions beyond those that a model was trained at. A pair of a head's
numbers turns as the position grows: pairs that turn often within the original positions keep their
speed, those that hardly turn once are slowed by `factor`, with a ramp between the two; cos and sin
are scaled. Formulas and defaults are those of transformers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from npr_jax.base.fields import Checked, Count, Positive, PositiveOrZero, Range


@dataclasses.dataclass(frozen=True)
class Yarn(Checked):
    """What config.json says with the rope type "yarn", by the same names; hashable.

    Attributes:
      factor: how many times the original positions there are.
      original_max_position_embeddings (positions): that the model was trained at.
      attention_factor: of cos and sin; None: by mscale and mscale_all_dim if both are given and
        above 0, else 0.1 ln(factor) + 1.
      beta_fast, beta_slow (turns): within the original positions, of the pairs at which the ramp
        begins and ends.
      mscale, mscale_all_dim: see attention_factor.
      truncate: the ramp begins and ends at whole pairs.
    """

    factor: Annotated[float, Range(ge=1)]
    original_max_position_embeddings: Count
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: PositiveOrZero | None = None
    mscale_all_dim: PositiveOrZero | None = None
    truncate: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast is {self.beta_fast}, needed is at least beta_slow={self.beta_slow}"
            )
        if self.max_position_embeddings >= 2**31:  # which are i32
            raise ValueError(
                f"factor is {self.factor}, needed are positions below 2**31: {product(self)}"
            )

    @property
    def max_position_embeddings(self) -> int:
        """Positions of the extended model."""
        return round(self.factor * self.original_max_position_embeddings)

    @property
    def scale(self) -> float:
        """What cos and sin are multiplied by."""

        def by(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return by(self.mscale) / by(self.mscale_all_dim)
        return by(1)

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """f32[head_dim / 2]: radians by which each pair turns from one position to the next."""

        def pair_of(turns: float) -> float:
            """The pair, in fractions, that turns so often within the original positions."""
            length = self.original_max_position_embeddings / (2 * math.pi * turns)
            return head_dim * math.log(length) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # In float32 step by step, as transformers does it: at position 100,000 an angle moves by
        # 0.01 with the last bit of a frequency. Only the power is rounded better than NumPy would.
        pairs, one = np.arange(head_dim // 2, dtype=np.float32), np.float32(1)
        kept = one - np.clip((pairs - low) / (high - low or 0.001), 0, 1).astype(np.float32)
        period = (theta ** np.float64(2 * pairs / head_dim)).astype(np.float32)
        return one / (np.float32(self.factor) * period) * (one - kept) + one / period * kept

    def to_hf(self) -> dict:
        """The object of config.json, without rope_theta; what has its default is left out."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {"rope_type": "yarn"} | values


def product(yarn: Yarn) -> str:
    """Where its max_position_embeddings comes from, for messages."""
    length = yarn.original_max_position_embeddings
    return f"with yarn it is factor={yarn.factor:g} times {_ORIGINAL}={length}"


_ORIGINAL = "original_max_position_embeddings"
_NEEDED = ("factor", _ORIGINAL)
_YARN = {field.name for field in dataclasses.fields(Yarn)}
_TYPES = ("rope_type", "type")


def read_rope(hf: Mapping) -> tuple[dict[str, Any], Yarn | None]:
    """What config.json says of rope_theta, by place and unchecked, and of YaRN: at the top level
    and in rope_scaling (old files), or in rope_parameters (transformers 5).

    Raises ValueError for whatever else is asked of the positions, or is contradictory.
    """
    thetas, yarns = {}, {}
    if hf.get("rope_theta") is not None:
        thetas["rope_theta"] = hf["rope_theta"]
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{name} is {rope!r}, needed is an object")
        types = [rope[key] for key in _TYPES if key in rope] or ["default"]
        for kind in types:
            if kind not in ("default", "yarn"):
                raise ValueError(f"rope type is {kind!r} ({name}), supported: 'default', 'yarn'")
        if types[0] != types[-1]:
            raise ValueError(f"{name} has rope_type={types[0]!r}, type={types[1]!r}: remove one")
        known = _YARN if "yarn" in types else set()
        for key, value in rope.items():
            if key == "rope_theta":
                thetas[f"{name}.{key}"] = value
            elif not (
                key in _TYPES
                or key in known
                or value is None
                or (key in ("factor", "partial_rotary_factor") and value == 1)
            ):
                raise ValueError(
                    f"{name}.{key} is {value!r}, supported with rope type {types[0]!r} are "
                    + ", ".join(("rope_theta", *sorted(known)))
                )
        if rope:
            yarns[name] = _read_yarn(hf, name, rope) if known else None
    # As in transformers rope_scaling has the first word: it may add yarn to plain rope_parameters.
    new, old = yarns.get("rope_parameters"), yarns.get("rope_scaling")
    if new and "rope_scaling" in yarns and new != old:
        raise ValueError(
            f"rope_parameters is {hf['rope_parameters']}, but rope_scaling is "
            f"{hf['rope_scaling']}: remove one"
        )
    return thetas, old or new


def _read_yarn(hf: Mapping, name: str, rope: Mapping) -> Yarn:
    """null is a default, as in transformers, but for `truncate`, where it is false there."""
    given: dict[str, Any] = {
        key: rope[key] for key in _YARN & rope.keys() if rope[key] is not None or key == "truncate"
    }
    for key in _NEEDED:
        if key not in given:
            raise ValueError(f"{name} has no {key!r}, needed is one with rope type 'yarn'")
    try:
        yarn = Yarn(**given)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error
    # transformers takes that of the top level where there are two
    if hf.get(_ORIGINAL) not in (None, yarn.original_max_position_embeddings):
        raise ValueError(f"{_ORIGINAL} is {hf[_ORIGINAL]!r}, but {name} is {rope}: remove one")
    said, most = hf.get("max_position_embeddings"), yarn.max_position_embeddings
    if isinstance(said, int) and said > most:  # less is the rule: model cards leave it as it was
        raise ValueError(
            f"max_position_embeddings is {said}, needed is {most} at most: {product(yarn)}"
        )
    return yarn
