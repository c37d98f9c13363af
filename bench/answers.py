"""Times comparisons of answers: plain numbers on two cores, and formulas in one worker process.

    python bench/answers.py

Writes bench/results/answers.json: comparisons per second. No pair occurs twice.
"""

import datetime
import json
import multiprocessing
import time
from pathlib import Path

from npr_jax.answers import equal, equal_many

PROCESSES, NUMBERS, FORMULAS = 2, 50_000, 200


def numbers(offset: int) -> list[tuple[str, str]]:
    """Integers, decimals, fractions and thousands' separators; half of them equal."""
    pairs = []
    for i in range(offset, offset + NUMBERS):
        reference = i + i % 2
        forms = (f"{i}", f"{i:,}", f"{i}.0", f"{2 * i}/2")
        pairs.append((forms[i // 2 % 4], str(reference)))
    return pairs


def compare_numbers(process: int) -> int:
    return sum(equal_many(numbers(process * NUMBERS)))


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        pool.map(abs, range(PROCESSES))  # the processes have started
        begun = time.perf_counter()
        right = pool.map(compare_numbers, range(PROCESSES), chunksize=1)
        plain = PROCESSES * NUMBERS / (time.perf_counter() - begun)
    assert sum(right) == PROCESSES * NUMBERS // 2, right
    assert equal("x+1", "1+x")  # the worker has started
    begun = time.perf_counter()
    assert all(equal_many([(rf"{i}\sqrt{{8}}", rf"{2 * i}\sqrt{{2}}") for i in range(FORMULAS)]))
    formulas = FORMULAS / (time.perf_counter() - begun)
    result = {
        "date": datetime.date.today().isoformat(),
        "processes": PROCESSES,
        "plain_numbers_per_s": round(plain),
        "formulas_per_s_one_worker": round(formulas),
    }
    Path(__file__).with_name("results").joinpath("answers.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
