"""A model as a whole: config, parameters, tokenizer and tags; loaded and saved together."""

import dataclasses

from npr_jax.model import ModelConfig
from npr_jax.tree import TagIds


@dataclasses.dataclass(frozen=True)
class Model:
    """`tokenizer` is None where there is none, `tags` where it does not know them."""

    config: ModelConfig
    params: dict
    tokenizer: object | None
    tags: TagIds | None
