"""The first steps of training are what they were: golden curves, which hold on every CPU."""

import curves
import pytest

# Vectors of another width add up in another order. Against the recorded curves (AVX2) the largest
# difference was 7.0e-6 with programs for SSE4.2 and 4.5e-6 for AVX (XLA_FLAGS=--xla_cpu_max_isa),
# 1.5e-6 with eight devices in place of one.
TOLERANCE = 1e-4


def largest_gap(found, recorded) -> float:
    """The largest relative difference between two curves of the same steps and keys."""
    assert [sorted(line) for line in found] == [sorted(line) for line in recorded]
    return max(
        abs(now[key] - old[key]) / max(abs(old[key]), 1e-12)
        for now, old in zip(found, recorded, strict=True)
        for key in old
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", curves.NAMES)
def test_the_first_steps_are_what_they_were(name, tmp_path, report):
    golden = curves.read(name)
    found = curves.measure(name, golden["data"], tmp_path)
    gap = largest_gap(found, golden["steps"])
    report(f"largest relative difference {gap:.1e}")
    assert gap < TOLERANCE, f"{found} is not {golden['steps']}"
