"""A small engine, and what must hold of any: its counts add up, and its answers do not change."""

import numpy as np

from npr_jax.decode import EngineConfig

CONFIG = EngineConfig(
    lanes=6,
    pages=200,
    page_size=4,
    steps=5,
    header_rows=4,
    header_chunk=4,
    prefill_rows=2,
    prefill_chunk=16,
    max_branches=4,
    max_depth=3,
)

TIE = 1e-3  # a smaller margin may fall either way when sums are taken in another order


def same(answer, other) -> int:
    """Equal tokens up to a tie of `answer`, the undisturbed one; log-probs equal until then.
    Returns how many ties there were, 0 or 1."""
    length = min(len(answer.token_ids), len(other.token_ids))
    differ = np.flatnonzero(answer.token_ids[:length] != other.token_ids[:length])
    if len(differ):
        # A tie may also shift what follows in depth-first order, so look at the margins before.
        assert answer.margin[: differ[0] + 1][answer.logp[: differ[0] + 1] < 0].min() < TIE
        length = differ[0]
    else:
        assert len(answer.token_ids) == len(other.token_ids)
        assert answer.finish_reason == other.finish_reason
    np.testing.assert_allclose(answer.logp[:length], other.logp[:length], atol=1e-4)
    return int(len(differ) > 0)


def recount(scheduler):
    """Segments as the tables of all running answers list them, and pages as the live segments do,
    against the counts; free, cached and held pages are disjoint and are all there are."""
    tables = [table for request in scheduler.running for table in request.tables()]
    segments = {id(segment): segment for table in tables for segment in table}
    for segment in segments.values():
        assert segment.refs == sum(segment in table for table in tables)
    pool, size = scheduler.pages, scheduler.config.page_size
    refs = np.zeros(len(pool.refs), int)
    for segment in segments.values():
        np.add.at(refs, segment.pages, 1)
    np.testing.assert_array_equal(refs, pool.refs)
    growing = [sequence for request in scheduler.running for sequence in request.growing()]
    tails = [sequence.tail for sequence in growing]
    writable = [page for tail in tails for page in tail.pages[tail.published :]]
    for segment in segments.values():
        if segment.of is not None and segment.pages:
            # It lists what another grows on, but writes to none of it, nor reads beyond its own.
            assert (
                segment.computed == len(segment.tokens)
                or segment.pages != (segment.of.pages[: len(segment.pages)])
            )
            np.subtract.at(refs, segment.pages, 1)
    assert all(tail.published * size < len(tail.tokens) for tail in tails)
    assert (refs[writable] == 1).all(), "a page that grows is shared"
    refs = np.array(pool.refs)
    for sequence in scheduler.bound:
        assert not (sequence.ready and any(map(sequence.lacks, sequence.table)))
        assert sequence.tail is sequence.items[-1]
    held = set(np.flatnonzero(refs).tolist())
    free, cached = set(pool._free), set(pool._cached)
    assert len(free) == len(pool._free)
    assert not (held & free or held & cached or free & cached)
    assert len(held) + len(free) + len(cached) == len(refs) - 1
    assert cached <= set(pool._key)
    assert {page: key for key, page in pool._published.items()} == pool._key
    for before, _ in pool._published:
        assert before == 0 or before in pool._key, "a cached page that nothing leads to"
