"""The process that compares answers: two forms a line in, a verdict a line out (`grade`).

Structure (lists, brackets, units, names) is compared here; two formulas by math-verify 0.9
(https://github.com/huggingface/Math-Verify), which sees nothing but formulas with exact numbers:
its rounding, its percentages and its search for an answer within a text have nothing to act on.
"""

import json
import os
import re
import resource
import signal
import sys

from npr_jax.answers.read import read
from npr_jax.answers.units import same as same_unit

TIME_LIMIT = 2.0  # seconds of CPU per pair: does not depend on what else the machine does
MEMORY_LIMIT = 4 << 30  # bytes of address space
DIGITS = 60  # to which the difference of two formulas must vanish
LONGEST_LIST = 40


def match(prediction: list, reference: list, names_count: bool = False) -> bool:
    """Whether two forms are the same answer.

    A name on one side only (`x = 5` for `5`) falls away, unless `names_count`.
    """
    kinds = prediction[0], reference[0]
    if "named" in kinds:
        return _match_named(prediction, reference, names_count)
    if "unit" in kinds:
        (p, p_unit), (r, r_unit) = (
            (form[1], form[2]) if form[0] == "unit" else (form, None)
            for form in (prediction, reference)
        )
        return same_unit(p_unit, r_unit) and match(p, r)
    if "word" in kinds:
        return prediction[1] == reference[1]
    if kinds[0] != kinds[1]:
        return False
    kind = kinds[0]
    if kind in ("text", "based"):
        return prediction == reference
    if kind == "expr":
        return same_value(prediction[1], reference[1])
    if kind in ("list", "union"):
        return _match_unordered(prediction[1], reference[1])
    if kind == "matrix":
        p, r = prediction[1], reference[1]
        return [len(row) for row in p] == [len(row) for row in r] and all(
            match(a, b)
            for p_row, r_row in zip(p, r, strict=True)
            for a, b in zip(p_row, r_row, strict=True)
        )
    if kind == "relation":
        return _same_relation(prediction[1:], reference[1:])
    closing, p, r = prediction[1], prediction[2], reference[2]
    return closing == reference[1] and len(p) == len(r) and all(map(match, p, r))


def _match_named(prediction: list, reference: list, names_count: bool) -> bool:
    (p_name, p), (r_name, r) = (
        (form[1], form[2]) if form[0] == "named" else (None, form)
        for form in (prediction, reference)
    )
    if p_name is not None and r_name is not None:
        if p_name == r_name:
            return match(p, r)
    elif "relation" not in (p[0], r[0]):
        return not names_count and match(p, r)
    # Two equations, of which one is solved for a letter.
    sides = []
    for name, form in ((p_name, p), (r_name, r)):
        if (
            name is not None
            and form[0] in ("expr", "word")
            and re.fullmatch(r"v _ \{ \d+ \}", name)
        ):
            sides.append(["=", name, form[1]])
        elif form[0] == "relation":
            sides.append(form[1:])
    return len(sides) == 2 and _same_relation(*sides)


def _match_unordered(prediction: list, reference: list) -> bool:
    """Each item has its partner: what is there twice must be there twice."""
    if len(prediction) != len(reference) or len(prediction) > LONGEST_LIST:
        return False
    # x = 1, y = 2 says more than 1, 2; x = 1, x = 2 does not.
    names_count = any(
        len({item[1] for item in items if item[0] == "named"}) > 1
        for items in (prediction, reference)
    )
    left = list(reference)
    for item in prediction:
        partner = next((r for r in left if match(item, r, names_count)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def same_value(prediction: str, reference: str) -> bool:
    """Whether two formulas are the same number or function."""
    from math_verify import verify
    from sympy import Symbol, simplify

    if prediction == reference:
        return True
    p, r = _parse(prediction), _parse(reference)
    if p is None or r is None:
        return False
    if isinstance(p, Symbol) or isinstance(r, Symbol):  # math-verify compares their names only
        return simplify(p - r) == 0
    if not verify([r], [p], numeric_precision=DIGITS, timeout_seconds=None):
        return False
    return simplify(p - r).is_zero is not False  # a difference beyond all DIGITS is one


def _same_relation(prediction: list, reference: list) -> bool:
    """Whether two relations differ by a constant factor: 2x = y and y/2 - x = 0."""
    from sympy import simplify

    (p_op, *p_sides), (r_op, *r_sides) = prediction, reference
    if p_op != r_op:
        return False
    p_left, p_right, r_left, r_right = map(_parse, p_sides + r_sides)
    if None in (p_left, p_right, r_left, r_right):
        return False
    below = simplify(r_left - r_right)
    if below == 0:
        return False
    factor = simplify((p_left - p_right) / below)
    if factor.free_symbols or not factor.is_finite or factor.is_zero is not False:
        return False
    return p_op == "=" or bool(factor.is_positive)


def _parse(latex: str):
    """The formula as a sympy expression, or None."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, Expr

    nothing = NormalizationConfig(False, False, False, False, "none")  # it would take s for seconds
    found = parse(
        f"${latex}$",
        [LatexExtractionConfig(normalization_config=nothing)],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]  # no limit
    )
    found = [item for item in found if isinstance(item, Basic)]
    return found[0] if len(found) == 1 and isinstance(found[0], Expr) else None


def serve() -> None:
    """Compares pairs until the input ends."""
    # Shows whether math-verify is there, and what is slow once is not charged to the first pair.
    match(read(r"\frac{6}{8}"), read(r"\frac{3}{4}"))
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a group, they are the parent's
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # Libraries print warnings: keep the answers on a channel of their own.
    out = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    out.write("ready\n")
    out.flush()
    os.dup2(null, 1)
    os.dup2(null, 2)
    for line in sys.stdin:
        # SIGPROF's default action ends the process, also in the middle of a C function.
        signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
        verdict = match(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(json.dumps(bool(verdict)) + "\n")
        out.flush()


if __name__ == "__main__":
    serve()
