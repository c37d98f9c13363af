"""Who decodes what: answers are dealt to replicas, and to processes, so that none waits for work.

A prompt is computed once by each that has answers to it, so its answers stay together as far as an
even deal allows. The keys of an answer come from its prompt's seed and its number alone
(`decode/keys.py`): who decodes it changes no token.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Some of the answers to one prompt: the prompt's number, and those of the answers."""

    prompt: int
    samples: range


def deal_answers(
    samples: Sequence[int], lengths: Sequence[int], loads: Sequence[int]
) -> list[list[Part]]:
    """Deals `samples[p]` answers to each prompt p to those who have `loads` to do already.

    Prompts are dealt whole as long as they fit, the longest first; the answers to the others fill
    up what room is left, one decoder after another (McNaughton's wrap-around rule, 1959). A
    prompt's own tokens do not count: to prefill them takes a few steps of decoding at most.

    Args:
      samples: answers to each prompt, 0 or more.
      lengths (tokens): expected of one answer to each prompt, 1 or more.
      loads (tokens): that each decoder still has to decode, 0 or more.

    Returns:
      The parts of each decoder, in order of prompts; every answer is in one of them. All that have
      part end with the same load but for less than the longest of `lengths`; none of the others has
      less to do. There are fewer parts than prompts and decoders together.
    """
    total = sum(num * length for num, length in zip(samples, lengths, strict=True))
    rooms = _rooms(total, loads)
    unit = sum(rooms) // total if total else 1  # rooms are counted in this part of a token
    dealt: list[list[Part]] = [[] for _ in loads]
    costs = [num * length * unit for num, length in zip(samples, lengths, strict=True)]
    rest = []
    for prompt in sorted(range(len(costs)), key=lambda p: -costs[p]):
        widest = max(range(len(rooms)), key=rooms.__getitem__)  # the first of those
        if not costs[prompt] or costs[prompt] > rooms[widest]:
            rest.append(prompt)
            continue
        rooms[widest] -= costs[prompt]
        dealt[widest].append(Part(prompt, range(samples[prompt])))
    decoder, used = 0, 0
    for prompt in sorted(rest):
        first = 0
        for sample in range(samples[prompt]):
            while used >= rooms[decoder]:  # an answer goes where it begins
                if first < sample:
                    dealt[decoder].append(Part(prompt, range(first, sample)))
                used, decoder, first = used - rooms[decoder], decoder + 1, sample
            used += lengths[prompt] * unit
        if first < samples[prompt]:
            dealt[decoder].append(Part(prompt, range(first, samples[prompt])))
    return [sorted(parts, key=lambda part: part.prompt) for parts in dealt]


def _rooms(total: int, loads: Sequence[int]) -> list[int]:
    """What each takes of `total` so that those who take any end level, as whole numbers: times the
    number of those."""
    ordered = sorted(loads)
    level, num = total, 0
    for num, load in enumerate(ordered, 1):
        level += load
        if num == len(ordered) or level <= num * ordered[num]:
            break
    return [max(0, level - num * load) for load in loads]
