"""Sizes and limits of an engine."""

import dataclasses

from npr_jax.decode.attention import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of an engine; every compiled shape follows from them.

    Attributes:
      lanes: slots of the batch: sequences that decode at the same time.
      pages, page_size: of the KV pool, one page of which is a dummy.
      table_pages: the longest table of a sequence; 0 allows the whole pool.
      steps: decode steps per host visit.
      header_rows, header_chunk: prefill of many sequences, this many tokens each (headers, tags,
        short prompts).
      prefill_rows, prefill_chunk: prefill of long prompts; decoding waits for one call at most.
      max_branches, max_depth: blocks beyond them are refused.
      on_invalid_block: "end" the answer, or go on "sequential"ly.
      max_stops: end-of-text ids and tags at which a lane can freeze.
      cache_dtype: of the pool; None is the parameters' dtype.
      attention: "blockwise", "pallas" or "gather" (decode/attention.py); None suits the platform
        and the model.

    On a mesh lanes, pages and prefill rows are those of each replica.
    """

    lanes: int = 16
    pages: int = 1024
    page_size: int = 16
    table_pages: int = 0
    steps: int = 16
    header_rows: int = 16
    header_chunk: int = 8
    prefill_rows: int = 4
    prefill_chunk: int = 128
    max_branches: int = 5
    max_depth: int = 4
    on_invalid_block: str = "end"
    max_stops: int = 8
    cache_dtype: str | None = None
    attention: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or field.type is int:
                low = 0 if field.name == "table_pages" else 1
                if value < low:
                    raise ValueError(f"{field.name} is {value}, needed is {low} or more")
        if self.attention not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"attention is {self.attention!r}, needed is one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.on_invalid_block not in ("end", "sequential"):
            raise ValueError(
                f"on_invalid_block is {self.on_invalid_block!r}, needed is 'end' or 'sequential'"
            )

    @property
    def longest_table(self) -> int:
        """Pages that the table of one sequence may list."""
        return self.table_pages or self.pages - 1
