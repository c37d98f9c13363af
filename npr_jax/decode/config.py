"""Sizes and limits of an engine."""

import dataclasses
from typing import Annotated, Literal

from npr_jax.base.fields import Checked, Count, CountOrZero, Range
from npr_jax.decode.attention import Implementation
from npr_jax.decode.sampling import MOST_BIASES, MOST_LOGPROBS
from npr_jax.tree.rules import PAPER, Rules


@dataclasses.dataclass(frozen=True)
class EngineConfig(Checked):
    """Sizes and limits of an engine; every compiled shape follows from them.

    Attributes:
      lanes (sequences): slots of the batch: as many decode at the same time; a branch is one.
      pages (pages): of the KV pool, one of which is a dummy.
      page_size (tokens): of a page.
      table_pages (pages): the longest table of a sequence; 0 allows the whole pool.
      steps (decode steps): per visit of the host.
      header_rows (sequences): of a prefill of short pieces: headers, tags, short prompts.
      header_chunk (tokens): of each of them at a time.
      prefill_rows (sequences): of a prefill of long prompts.
      prefill_chunk (tokens): of each of them at a time; decoding waits for one call at most.
      max_branches (branches): of a block; one with more is refused.
      max_depth (levels): of blocks inside blocks; deeper ones are refused.
      max_blocks (blocks): of a line, the trunk or a branch; further ones are refused. 0 is off.
      rules: of fork, join and positions, by which answers are decoded, laid out and trained on.
      on_invalid_block: "end" the answer at a block that is refused, or go on "sequential"ly.
      max_stops (token ids): end-of-text ids and tags at which a lane can freeze.
      cache_dtype: of the pool; null is the parameters' dtype, "int8" has a scale for each head of
        an entry (not with "pallas").
      attention: "blockwise", "pallas" or "gather" (decode/attention.py); null suits the platform
        and the model.
      exact: raw log-probs have the bits that a trainer with `train.exact` computes for the tokens,
        on one CPU device, with attention and cache_dtype null.
      max_logprobs (tokens): the most of the likeliest that `sampling.logprobs` and
        `prompt_logprobs` may ask for; 0 leaves both out of the compiled programs.
      max_logit_bias (pairs): that `sampling.logit_bias` may have; 0 leaves it out of the compiled
        programs.

    On a mesh lanes, pages and prefill rows are those of each replica.
    """

    lanes: Count = 16
    pages: Annotated[int, Range(ge=2)] = 1024
    page_size: Count = 16
    table_pages: CountOrZero = 0
    steps: Count = 16
    header_rows: Count = 16
    header_chunk: Count = 8
    prefill_rows: Count = 4
    prefill_chunk: Count = 128
    max_branches: Count = 5
    max_depth: Count = 4
    max_blocks: CountOrZero = 0
    rules: Rules = PAPER
    on_invalid_block: Literal["end", "sequential"] = "end"
    max_stops: Count = 8
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    attention: Implementation | None = None
    exact: bool = False
    max_logprobs: Annotated[int, Range(ge=0, le=MOST_LOGPROBS)] = 0
    max_logit_bias: Annotated[int, Range(ge=0, le=MOST_BIASES)] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.exact and self.attention is not None:
            raise ValueError(
                f"attention is {self.attention!r} and exact true, which has its own: set attention "
                "to null, or exact to false"
            )
        if self.rules.trial is not None and self.on_invalid_block == "sequential":
            raise ValueError(
                f"on_invalid_block is 'sequential' and rules.trial {self.rules.trial!r}: set "
                "on_invalid_block to 'end', or rules.trial to null"
            )

    def check_trials(self) -> None:
        """Raises ValueError where there are trials, which no stage trains on."""
        if self.rules.trial is not None:
            raise ValueError(
                f"engine.rules.trial is {self.rules.trial!r}, needed is null: trials are decoded, "
                "replayed and judged, but not trained on"
            )

    def check_rows(self, layout: str) -> None:
        """Raises ValueError where the rows of training can have no bound on hidden intervals, or
        the `layout` that a stage trains under is "reference" and knows no rules."""
        if layout == "reference" and self.rules != PAPER:
            raise ValueError(
                f"engine.rules are {self.rules}, needed are the defaults: layout 'reference' has "
                "masks and positions of its own"
            )
        if self.rules.fork == "fresh" and not self.max_blocks:
            raise ValueError(
                "engine.max_blocks is 0 and engine.rules.fork 'fresh', which hides a token once "
                "more for each later block: to train set max_blocks to 1 or more, or fork to "
                "'trunk'"
            )

    def smaller(self) -> str:
        """Which settings make decoding need less memory."""
        return (
            f"set fewer engine.pages (there are {self.pages}) or engine.lanes (there are "
            f"{self.lanes}), or a larger mesh.tensor"
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of lanes for which decoding is compiled: a line alone, the branches of a block,
        four times as many, and so on up to all. A step is as wide as what is at work needs."""
        found, width = [1], max(2, self.max_branches)
        while 3 * width <= 2 * self.lanes and len(found) < 7:
            found.append(width)
            width *= 4
        return tuple(dict.fromkeys((*found, self.lanes)))

    @property
    def longest_table(self) -> int:
        """Pages that the table of one sequence may list."""
        return self.table_pages or self.pages - 1
