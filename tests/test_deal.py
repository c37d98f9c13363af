"""Answers are dealt evenly, each once, and prompts are kept together."""

from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.decode.deal import Part, deal_answers

PROMPTS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30_000)), max_size=40)
LOADS = st.lists(st.integers(0, 100_000), min_size=1, max_size=64)
ALIKE = st.integers(1, 64).map(lambda num: [0] * num)


def check(samples, lengths, loads):
    dealt = deal_answers(samples, lengths, loads)
    assert len(dealt) == len(loads)
    found = sorted((part.prompt, i) for parts in dealt for part in parts for i in part.samples)
    assert found == [(p, i) for p, num in enumerate(samples) for i in range(num)]
    ends = [
        load + sum(len(part.samples) * lengths[part.prompt] for part in parts)
        for load, parts in zip(loads, dealt, strict=True)
    ]
    longest = max((length for length, n in zip(lengths, samples, strict=True) if n), default=0)
    # The level at which those end who take part: poured in until all is there.
    low, high = min(loads), max(loads) + sum(n * x for n, x in zip(samples, lengths, strict=True))
    for _ in range(80):
        level = (low + high) / 2
        poured = sum(max(0.0, level - load) for load in loads)
        low, high = (level, high) if poured < sum(ends) - sum(loads) else (low, level)
    for load, end in zip(loads, ends, strict=True):
        assert abs(end - max(load, high)) < longest + 0.01
    asked = sum(num > 0 for num in samples)
    assert sum(map(len, dealt)) <= asked + len(loads) - 1
    for parts in dealt:
        prompts = [part.prompt for part in parts]
        assert prompts == sorted(set(prompts))
    return dealt


@given(PROMPTS, st.one_of(ALIKE, LOADS))
@settings(deadline=None)
def test_answers_are_dealt_once_evenly_and_together(prompts, loads):
    check([num for num, _ in prompts], [length for _, length in prompts], loads)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 64))
@settings(deadline=None)
def test_answers_of_one_length_leave_nobody_idle(prompts, samples, decoders):
    dealt = check([samples] * prompts, [1] * prompts, [0] * decoders)
    sizes = [sum(len(part.samples) for part in parts) for parts in dealt]
    assert max(sizes) - min(sizes) <= 1
    # The first answer is the first one's, who shows people what is answered.
    assert dealt[0][0].prompt == 0 and dealt[0][0].samples[0] == 0
    if prompts % decoders == 0:
        assert all(len(part.samples) == samples for parts in dealt for part in parts)


def test_sixteen_prompts_of_sixteen_answers_keep_sixty_four_hosts_at_work():
    dealt = deal_answers([16] * 16, [1] * 16, [0] * 64)
    assert [len(parts) for parts in dealt] == [1] * 64
    assert dealt[4:6] == [[Part(1, range(4))], [Part(1, range(4, 8))]]


def test_who_has_more_to_do_gets_less():
    assert deal_answers([1] * 8, [1] * 8, [0, 100]) == [[Part(p, range(1)) for p in range(8)], []]
    assert deal_answers([6], [1], [0, 2]) == [[Part(0, range(4))], [Part(0, range(4, 6))]]
