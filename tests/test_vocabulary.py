"""A vocabulary in shards against one in a single piece: lookups, the most likely token, log-probabilities, ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec

from kogpt_jax.sharding import VOCAB_AXES, make_mesh
from kogpt_jax.vocabulary import Vocabulary

EXTENTS = [(1, 2), (2, 1), (2, 4), (8, 1)]
SIZES = [9, 64, 259]  # over 8 shards three of 9 tokens' are padding alone
BATCH = 6

pytestmark = pytest.mark.parametrize("extents", EXTENTS, ids=str)


def padded(array: np.ndarray, vocabulary: Vocabulary, axis: int) -> np.ndarray:
    """With values behind the vocabulary's end that would show."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, vocabulary.padded_size - vocabulary.size)
    return np.pad(array, widths, constant_values=1e9)


def over_shards(function, extents, axis, array, *others):
    """Calls a function on the shards of an array that has the vocabulary on an axis; the result on every device."""
    pipe, tensor = extents
    specs = [PartitionSpec(*[None] * axis, VOCAB_AXES), *[PartitionSpec()] * len(others)]
    results = jax.shard_map(
        lambda *args: jax.tree.map(lambda x: x[None], function(*args)),  # a row for each device
        mesh=make_mesh(1, pipe, tensor),
        in_specs=tuple(specs),
        out_specs=PartitionSpec(VOCAB_AXES),
        check_vma=False,
    )
    rows = jax.tree.map(np.asarray, jax.jit(results)(array, *others))
    for row in jax.tree.leaves(rows):
        np.testing.assert_array_equal(row, np.broadcast_to(row[:1], row.shape), err_msg="devices differ")
    return jax.tree.map(lambda row: row[0], rows)


@pytest.mark.parametrize("size", SIZES)
def test_every_token_is_looked_up_in_its_shard(extents, size):
    vocabulary = Vocabulary(size, extents[0] * extents[1])
    table = np.random.default_rng(size).normal(size=(size, 5)).astype(np.float32)
    tokens = np.random.default_rng(1).permutation(size).reshape(-1, 1).astype(np.int32)
    rows = over_shards(vocabulary.lookup, extents, 0, padded(table, vocabulary, 0), tokens)
    np.testing.assert_array_equal(rows, table[tokens])


@pytest.mark.parametrize("size", SIZES)
def test_logits_of_a_batch(extents, size):
    vocabulary, whole = Vocabulary(size, extents[0] * extents[1]), Vocabulary(size)
    rng = np.random.default_rng(size)
    logits = (5 * rng.normal(size=(BATCH, size))).astype(np.float32)
    logits[0] = 1.5  # all equal: the first token
    logits[1, [size - 1, size // 2, 3]] = 50.0  # three equal ones in shards apart
    logits[2, rng.permutation(size)[: size - 2]] = -np.inf
    logits[3] -= 30.0
    targets = rng.integers(0, size, BATCH).astype(np.int32)

    def run(logits, targets):
        logits = vocabulary.without_padding(logits)
        return vocabulary.gather(logits), *vocabulary.most_likely(logits), vocabulary.logprobs(logits, targets)

    gathered, tokens, largest, chosen = over_shards(run, extents, 1, padded(logits, vocabulary, 1), targets)
    np.testing.assert_array_equal(gathered, logits)
    expected_tokens, expected_largest = whole.most_likely(jnp.asarray(logits))
    np.testing.assert_array_equal(tokens, expected_tokens)
    assert tokens[:2].tolist() == [0, 3]
    tolerances.assert_close(largest, expected_largest, tolerances.LOGPROBS_VS_MESH)
    expected = np.asarray(whole.logprobs(jnp.asarray(logits), jnp.asarray(targets)))
    np.testing.assert_array_equal(np.isneginf(chosen), np.isneginf(expected))
    is_finite = np.isfinite(expected)
    tolerances.assert_close(chosen[is_finite], expected[is_finite], tolerances.LOGPROBS_VS_MESH)


def test_a_nan_in_any_shard_shows(extents):
    size = 259
    vocabulary = Vocabulary(size, extents[0] * extents[1])
    logits = np.random.default_rng(0).normal(size=(2, size)).astype(np.float32)
    logits[1, 200] = np.nan

    def run(logits):
        logits = vocabulary.without_padding(logits)
        return *vocabulary.most_likely(logits), vocabulary.logprobs(logits, jnp.zeros(2, jnp.int32))

    tokens, largest, chosen = over_shards(run, extents, 1, padded(logits, vocabulary, 1))
    assert tokens.tolist() == [int(logits[0].argmax()), 200]
    assert np.isnan(largest).tolist() == np.isnan(chosen).tolist() == [False, True]
