"""The rules of fork, join and positions, by which spans of branches are laid out."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Literal

from npr_jax.base.fields import Checked, Range


@dataclasses.dataclass(frozen=True)
class Rules(Checked):
    """What trunk and branches see of each other, and where the trunk goes on.

    The defaults are the paper's (arXiv 2512.07461). "last" and "fresh" together are how APR's
    searches call others (arXiv 2504.15466), on keys that stay; "sum" is ASPD's (arXiv 2508.08895).
    docs/tree.md states them token by token.

    Attributes:
      join: what the trunk sees of a branch after the join: "all" of it; or the "last" part, what
        stands behind the last `marker` of its step, with its header and `</step>`.
      fork: what a branch sees beside itself: the "trunk" so far; or "fresh", the prompt and its own
        plan.
      positions: where the trunk goes on after the join: "max", one after the longest branch; or
        "sum", as if the branches were one text.
      marker: of join "last": a text that is one token, or a token's id. A step without it is seen
        in whole.
      trial: the same of plans: a block whose every plan holds it is a block of trials, of which the
        first that ends with a result cuts the others off, as in Parason (arXiv 2608.24658). Null:
        there are none.
      failure: the same of the steps of trials: one that ends with it has no result.
    """

    join: Literal["all", "last"] = "all"
    fork: Literal["trunk", "fresh"] = "trunk"
    positions: Literal["max", "sum"] = "max"
    marker: Annotated[str | int | None, Range(ge=0)] = None
    trial: Annotated[str | int | None, Range(ge=0)] = None
    failure: Annotated[str | int | None, Range(ge=0)] = None

    def __post_init__(self):
        super().__post_init__()
        if self.join == "last" and self.marker in (None, ""):
            raise ValueError(
                f"marker is {self.marker!r} and join 'last', needed is a text of one token: set "
                "marker, or join to 'all'"
            )
        if self.join == "all" and self.marker is not None:
            raise ValueError(
                f"marker is {self.marker!r} and join 'all', which has none: set join to 'last', or "
                "marker to null"
            )
        for name in ("trial", "failure"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is '', needed is a text of one token, or null")
        if (self.trial is None) != (self.failure is None):
            raise ValueError(
                f"trial is {self.trial!r} and failure {self.failure!r}, needed are both, or neither"
            )

    @property
    def hide(self) -> bool:
        """Whether trunk or branches see a part only of what there is."""
        return self.join == "last" or self.fork == "fresh"

    def of_trials(self, plans: Iterable[Sequence[int]]) -> bool:
        """Whether plans of these tokens make a block of trials: every one holds the mark."""
        return self.trial is not None and all(self.trial in plan for plan in plans)

    def has_result(self, body: Iterable[int], whitespace: Collection[int]) -> bool:
        """Whether a trial whose step holds this, between its header and `</step>`, has a result: it
        says something, and the last of that is not the failure."""
        said = [token for token in body if token not in whitespace]
        return bool(said) and said[-1] != self.failure

    def intervals(self, max_depth: int, max_blocks: int) -> int:
        """The most hidden intervals that a token of a tree has, of blocks nested `max_depth` deep
        and `max_blocks` of them to a line: one a level for the siblings of its branches; and where
        branches are fresh, one for each later block of a line that sees it, and one more where it
        is of a plan."""
        return max_depth if self.fork == "trunk" else max_depth * max_blocks + 1


PAPER = Rules()
MARKS = ("marker", "trial", "failure")  # the rules that are tokens
