"""`python -m npr_jax` is the console script `npr-jax`."""

from npr_jax.cli import main

if __name__ == "__main__":
    main()
