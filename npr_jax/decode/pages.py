"""Who holds which page of the KV pool: a free list and a reference count per page.

A page's count is the number of tables (live lines of the engine) that list it. Page 0 is never
given out: padding and frozen lanes write there, and no query ever reads it.
"""

from collections.abc import Sequence

import numpy as np


class PagePool:
    """Host-side allocator of `num_pages` pages, of which `num_pages - 1` can be held."""

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"pages is {num_pages}, needed is at least 2 (page 0 is the dummy)")
        self.refs = np.zeros(num_pages, np.int32)
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Pages listed by at least one table."""
        return len(self.refs) - 1 - len(self._free)

    def allocate(self, count: int, refs: int) -> list[int] | None:
        """`count` pages, listed by `refs` tables each; None, and no change, if fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self.refs[pages] = refs
        return pages

    def add(self, pages: Sequence[int]) -> None:
        """One more table lists these held pages."""
        pages = np.asarray(pages, np.int32)
        assert (self.refs[pages] > 0).all(), "a free page was listed"
        self.refs[pages] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One table less lists these pages; those that no table lists become free."""
        pages = np.asarray(pages, np.int32)
        assert (self.refs[pages] > 0).all(), "a free page was dropped"
        self.refs[pages] -= 1
        self._free.extend(pages[self.refs[pages] == 0].tolist())
