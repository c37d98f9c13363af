"""Who holds which page of the KV pool, and which pages of prompts are kept for the next.

A page is free, held (its count, the live segments that list it, is above 0) or cached: whole pages
of plain text are published by their content, and stay after their last holder has gone, until
pages run short; the least recently held go first. Page 0 is never given out: padding and frozen
lanes write there, and no query ever reads it.
"""

from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Host-side allocator of `num_pages` pages, of which `num_pages - 1` can be held."""

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"pages is {num_pages}, needed is at least 2 (page 0 is the dummy)")
        self.refs = [0] * num_pages
        self.evictions = 0
        self._free = list(range(num_pages - 1, 0, -1))
        # A published page is found by the published page before it (0 for the first) and its own
        # tokens, so equal keys mean equal prefixes.
        self._published: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # without a holder, oldest first

    @property
    def num_free(self) -> int:
        """Pages with nothing in them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Published pages that nobody holds."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated now: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that at least one segment lists."""
        return len(self.refs) - 1 - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one holder each; None, and no change, if fewer are available."""
        if count > self.num_available:
            return None
        while len(self._free) < count:
            page, _ = self._cached.popitem(last=False)
            del self._published[self._key.pop(page)]
            self._free.append(page)
            self.evictions += 1
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.refs[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """One more holder of a held or cached page."""
        assert self.refs[page] or page in self._cached, "a free page was held"
        self._cached.pop(page, None)
        self.refs[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less of pages that follow each other in a table. Without a holder a page is
        free, or cached if it is published: the last of them the oldest, so that no page is evicted
        before those that are found through it."""
        for page in reversed(pages):
            assert self.refs[page] > 0, "a free page was dropped"
            self.refs[page] -= 1
            if not self.refs[page]:
                if page in self._key:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def leads_on(self, page: int) -> bool:
        """Whether pages can be found, and published, behind this one (0: at the start)."""
        return page == 0 or page in self._key

    def find(self, before: int, tokens: tuple[int, ...]) -> int | None:
        """The published page with these tokens behind the published page `before` (0: none)."""
        return self._published.get((before, tokens))

    def publish(self, before: int, tokens: tuple[int, ...], page: int) -> None:
        """Lets later prompts find a held page that is computed and full."""
        assert (before, tokens) not in self._published and page not in self._key
        self._published[before, tokens] = page
        self._key[page] = (before, tokens)

    def forget(self) -> None:
        """Unpublishes everything: the weights are no longer those that computed it."""
        self._published.clear()
        self._key.clear()
        self._free.extend(self._cached)
        self._cached.clear()
