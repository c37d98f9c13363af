"""Whether two answers are equal: one room for rewards, rejection sampling and evaluation."""

from npr_jax.answers.grade import equal, equal_many, extract, find_boxed

__all__ = ["equal", "equal_many", "extract", "find_boxed"]
