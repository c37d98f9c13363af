"""Which groups of answers are finished first, where more are sampled than are trained on.

    lengths so far of all processes --losers--> answers that nobody waits for

An answer takes as many decode steps as there are tokens on its longest path, and a group as many as
its longest answer; this is what counts, and not a clock. So lanes, neighbours, replicas and hosts
change when a loser is given up, but never who wins: the same seed gives the same groups (but for
answers that end because the engine has no pages left, which is a matter of what is beside them).
"""

from collections.abc import Sequence

from npr_jax.base.distributed import gather, group_size

SYNC = 4  # visits of the engine between two looks at what other processes have


class Race:
    """The first `wanted` of `groups` groups, of which this process decodes the answers `keys`:
    (group, sample) each. All processes make one together, and each calls `winners` at the end."""

    def __init__(self, keys: Sequence[tuple[int, int]], groups: int, wanted: int):
        self._keys, self._groups, self._wanted = keys, groups, wanted
        self._visits, self._lengths, self._lost = 0, [0] * groups, frozenset[int]()

    def watch(self, lengths: Sequence[int], finished: Sequence[bool]) -> list[int]:
        """What `Engine.generate` asks between two visits: which of its answers to give up."""
        self._visits += 1
        if group_size() == 1 or self._visits % SYNC == 0:
            self._compare(lengths, finished, False)
        open_ = [i for i, done in enumerate(finished) if not done]
        return [i for i in open_ if self._keys[i][0] in self._lost]

    def winners(self, lengths: Sequence[int]) -> list[int]:
        """The groups that are first, in their own order, once all of this process's answers have
        ended, with `lengths`. Waits for the other processes."""
        while not self._compare(lengths, [True] * len(lengths), True):
            pass
        order = sorted(range(self._groups), key=lambda group: (self._lengths[group], group))
        return sorted(order[: self._wanted])

    def _compare(self, lengths: Sequence[int], finished: Sequence[bool], over: bool) -> bool:
        """Tells the other processes, and hears from them; whether it is over for all."""
        longest, unfinished = [0] * self._groups, [0] * self._groups
        for (group, _), length, done in zip(self._keys, lengths, finished, strict=True):
            longest[group] = max(longest[group], length)
            unfinished[group] += not done
        everyones = gather((longest, unfinished, over))
        self._lengths = [max(column) for column in zip(*(x for x, _, _ in everyones), strict=True)]
        left = [sum(column) for column in zip(*(x for _, x, _ in everyones), strict=True)]
        self._lost = losers(self._lengths, left, self._wanted)
        return all(x for _, _, x in everyones)


def losers(lengths: Sequence[int], unfinished: Sequence[int], wanted: int) -> frozenset[int]:
    """The groups that cannot be among the first `wanted`, whatever is still decoded.

    Args:
      lengths (tokens): of each group's longest answer, as far as it has come.
      unfinished: how many answers of each group may still grow.
    """
    known = sorted(x for x, left in zip(lengths, unfinished, strict=True) if not left)
    if len(known) < wanted:
        return frozenset()
    return frozenset(group for group, x in enumerate(lengths) if x > known[wanted - 1])
