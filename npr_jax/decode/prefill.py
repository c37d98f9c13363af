"""What a prefill computes: which tokens of which sequences, and which of them it scores."""

import numpy as np

from npr_jax.decode.scheduler import Scheduler
from npr_jax.decode.sequence import PromptScores, Segment, Sequence

Run = list[tuple[Segment, int]]  # segments, and how many of the tokens of each
# What a call scores: tokens of a prompt, by their positions in it, and where they are in the call.
Scored = list[tuple[PromptScores, np.ndarray, np.ndarray]]


def score_targets(work, rows: int, chunk: int) -> tuple[np.ndarray, Scored]:
    """The tokens i32[rows, chunk] that a call for `work` scores (-1: none), each in the place of
    the one before it, and which they are; from now on they are not missing."""
    targets, found = np.full(rows * chunk, -1, np.int32), []
    for row, _, run in work:
        begin = row * chunk
        for segment, count in run:
            if segment.to_score:
                scores, first = segment.scores, segment.start + segment.computed + 1
                at = first + np.flatnonzero(scores.missing[first : first + count])
                here = begin + at - first
                targets[here] = scores.token_ids[at]
                scores.missing[at] = False
                found.append((scores, at, here))
            begin += count
    return targets.reshape(rows, chunk), [each for each in found if len(each[1])]


def copies_of(unready: list[Sequence]) -> list[Segment]:
    """The copies that sequences lack and that can be made, since what they are of is computed."""
    found = {
        segment: None
        for sequence in unready
        for segment in sequence.needs
        if segment.pieces
        and sequence.lacks(segment)
        and all(other.computed >= end for other, _, end in segment.pieces)
    }
    return list(found)


def runs_of(sequence: Sequence, size: int, but: set[Segment]) -> list[list[Segment]]:
    """What a sequence lacks, but for some segments, by what can be computed one after the other in
    the same rows: each but the last fills its pages, and sees what the next sees before it. What
    may see a copy waits until that is made."""
    runs: list[list[Segment]] = []
    full: Segment | None = None  # the last segment, if the next may follow it
    for segment in sequence.needs:
        if segment.pieces and sequence.lacks(segment):
            break
        lacks = segment not in but and sequence.lacks(segment) > 0
        if lacks and full and segment.before == full.table and not segment.computed:
            runs[-1].append(segment)
        elif lacks:
            runs.append([segment])
        full = segment if lacks and len(segment.tokens) % size == 0 else None
    return runs


def prefill_work(scheduler: Scheduler, unready: list[Sequence], rows: int, chunk: int):
    """Pieces (scheduler, run) of what the sequences lack that one call can compute together; a run
    is some of `runs_of`, (segment, how many of its tokens) each, and takes a row for every `chunk`
    of its tokens."""
    work: list[tuple[Scheduler, Run]] = []
    planned: set[Segment] = set()  # of which this call computes all
    # Prompt pages that this call begins: an equal prompt waits, then adopts them, unless it has
    # tokens to be scored.
    pages = set()
    for sequence in unready:
        for segment in sequence.needs:
            found = scheduler.adopt(segment, sequence.tail)
            scheduler.found_cached(sequence.request, found)
        for segments in runs_of(sequence, scheduler.config.page_size, planned):
            run, length = [], 0
            for segment in segments:
                room, page = rows * chunk - length, scheduler.next_page(segment)
                if not room or (page in pages and not segment.to_score):
                    break
                pages.add(page)
                pages.discard(None)
                count = sequence.lacks(segment)
                run.append((segment, min(count, room)))
                length += min(count, room)
                if count <= room:
                    planned.add(segment)
            if run:
                work.append((scheduler, run))
                rows -= -(-length // chunk)
            if not planned.issuperset(segments):
                if not rows:  # the next call goes on here
                    return work
                break
    return work
