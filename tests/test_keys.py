"""Keys made on the host are those of jax.random."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_jax.decode.keys import BRANCH, PRNG, branch_keys, fold_in, seed_keys

WORD = st.integers(0, 2**32 - 1)


@given(WORD, WORD, st.lists(WORD, min_size=1, max_size=5))
@settings(deadline=None)  # jax compiles in some of them
def test_keys_are_folded_as_jax_folds_them(high, low, numbers):
    key = np.array([high, low], np.uint32)
    wrapped = jax.random.wrap_key_data(key, impl=PRNG)
    expected = [jax.random.key_data(jax.random.fold_in(wrapped, n)) for n in numbers]
    np.testing.assert_array_equal(fold_in(key, np.array(numbers)), expected)


@given(WORD)
def test_the_key_of_a_seed_is_jax_own(seed):
    expected = jax.random.key_data(jax.random.key(seed, impl=PRNG))
    np.testing.assert_array_equal(seed_keys(seed), expected)


def test_branches_have_keys_of_their_own():
    key = seed_keys(7)
    stream = jax.random.fold_in(jax.random.wrap_key_data(key, impl=PRNG), BRANCH)
    expected = [jax.random.key_data(jax.random.fold_in(stream, i)) for i in range(6)]
    keys = branch_keys(key, 6)
    np.testing.assert_array_equal(keys, expected)
    np.testing.assert_array_equal(branch_keys(key, 4), keys[:4])  # not their number's
    assert len({key.tobytes() for key in keys}) == 6
