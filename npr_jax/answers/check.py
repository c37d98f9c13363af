"""Who says whether an answer is right: `equal`, or a function of the user's own."""

import functools
from collections.abc import Callable
from typing import cast

from npr_jax.answers.grade import equal
from npr_jax.base.modules import load_module

# (prediction, the content of the box; reference, the problem's answer) -> whether it is right
Check = Callable[[str, str], bool]


@functools.cache
def find_check(source: str | None) -> Check:
    """`equal` for None; else the function `check` of a Python file or of a module.

    It is trusted: training finds whatever it accepts. Raises ValueError where there is none.
    """
    if source is None:
        return equal
    check = getattr(load_module(source), "check", None)
    if not callable(check):
        raise ValueError(
            f"checker is {source!r}, which has no function check(prediction, reference)"
        )
    return cast(Check, check)
