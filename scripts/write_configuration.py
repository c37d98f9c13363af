"""Writes docs/configuration.md: every key of every config, from the declarations."""

from pathlib import Path

from npr_jax.base.reference import page
from npr_jax.train.configs import CONFIGS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

Every command below takes a YAML file, or the name of a preset in `configs/`, and changes of it:
`--set train.row_len=1024`. `npr-jax config zero` prints all keys of a stage with their defaults, as
a file to begin with; what it says of them is on this page too, which
`scripts/write_configuration.py` makes from the same declarations.

A key that does not exist, a value of another type and a number out of its range are errors that
name file, key, value and what is needed. Numbers are finite; integers are below 2**31 and numbers,
where they are not 0, from 1e-30 to 1e30 in size, unless the key says otherwise.

"""

if __name__ == "__main__":
    PAGE.write_text(HEAD + page(CONFIGS.values()), encoding="utf-8")
