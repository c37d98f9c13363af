"""What a server is started with."""

import dataclasses
from typing import Annotated, ClassVar

from npr_jax.base.compile_cache import DEFAULT_CACHE
from npr_jax.base.fields import Checked, Count, CountOrZero, Dtype, Positive, Range
from npr_jax.data.prompts import INSTRUCTION
from npr_jax.decode import EngineConfig, SamplingParams


@dataclasses.dataclass(frozen=True)
class ServeConfig(Checked):
    """How to serve a model.

    Attributes:
      dtype: of weights and cache.
      instruction: what the last user's turn of a chat is asked for, after its text, of a model with
        tags and a chat template; a request may bring its own. Empty asks for nothing.
      engine: what decodes the answers.
      sampling: what a request that says nothing gets; without a `seed` it gets one at random.
      compilation_cache: where compiled programs are kept for the next start; null keeps none.
      host: address to listen at; 0.0.0.0 is all of them.
      port: to listen at; 0 takes a free one.
      name: of the model in the API; null is the last part of its directory or hub id.
      max_requests (answers): that may be unfinished at a time; more are refused with 429.
      max_prompts (prompts): of a request.
      max_choices (answers): to a prompt, `n`.
      max_tokens (tokens): that a request may ask for in an answer; null is as many as fit.
      max_body (bytes): of a request.
      header_seconds (s): in which a request's headers, and then its body, have to come.
      stalled_seconds (s): for which a client may read nothing of its stream.
      drain (s): that unfinished answers may take after SIGTERM, before they are aborted.
      cors: origins whose pages may ask ("*": all); none by default.
    """

    command: ClassVar[str] = "serve"

    dtype: Dtype = "float32"
    instruction: str = INSTRUCTION
    engine: EngineConfig = dataclasses.field(
        default_factory=lambda: EngineConfig(max_logprobs=20, max_logit_bias=300)
    )
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    compilation_cache: str | None = str(DEFAULT_CACHE)
    host: str = "127.0.0.1"
    port: Annotated[int, Range(ge=0, le=65535)] = 8000
    name: str | None = None
    max_requests: Count = 1024
    max_prompts: Count = 256
    max_choices: Count = 128
    max_tokens: Count | None = None
    max_body: Count = 16 * 2**20
    header_seconds: Positive = 10.0
    stalled_seconds: Positive = 60.0
    drain: CountOrZero = 30
    cors: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.sampling.n != 1:
            raise ValueError(f"sampling.n is {self.sampling.n}, needed is 1: a request has its own")
