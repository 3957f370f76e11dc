"""Parts of the model that a whole forward on one platform does not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from custom_ops.decode_attention import _attend_all_pages, _attend_page_after_page
from kogpt_jax.kv_cache import PAGE_LEN

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
LENGTHS = (1, PAGE_LEN - 1, PAGE_LEN, PAGE_LEN + 1, 3 * PAGE_LEN)
NUM_HEADS, HEAD_DIM, MAX_PAGES = 3, 24, 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attend", [_attend_all_pages, _attend_page_after_page], ids=lambda f: f.__name__)
def test_both_ways_of_decode_attention(attend, dtype):
    """Each platform runs one of the two; both give softmax(q k / sqrt(H)) v over the valid keys and nothing else."""
    rng = np.random.default_rng(0)
    num_pages = len(LENGTHS) * MAX_PAGES + 1
    page_table = rng.permutation(num_pages - 1).reshape(len(LENGTHS), MAX_PAGES).astype(np.int32)
    rows = rng.normal(size=(2, len(LENGTHS), MAX_PAGES * PAGE_LEN, NUM_HEADS, HEAD_DIM))
    q, keys, values = (
        np.asarray(jnp.asarray(x, DTYPES[dtype]), np.float64)
        for x in (rng.normal(size=(len(LENGTHS), NUM_HEADS, HEAD_DIM)), *rows)
    )
    pools = []
    for tokens in (keys, values):
        pool = np.full((num_pages, NUM_HEADS, PAGE_LEN, HEAD_DIM), np.nan)  # what is not valid is poison
        for row, length in enumerate(LENGTHS):
            for token in range(length):
                pool[page_table[row, token // PAGE_LEN], :, token % PAGE_LEN] = tokens[row, token]
        pools.append(jnp.asarray(pool, DTYPES[dtype]))

    out = jax.jit(attend)(jnp.asarray(q, DTYPES[dtype]), *pools, jnp.asarray(page_table), jnp.asarray(LENGTHS))

    assert out.dtype == DTYPES[dtype]
    for row, length in enumerate(LENGTHS):
        scores = np.einsum("nh,snh->ns", q[row], keys[row, :length]) / np.sqrt(HEAD_DIM)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        expected = np.einsum("ns,snh->nh", probs / probs.sum(axis=-1, keepdims=True), values[row, :length])
        tolerances.assert_close(out[row], expected, tolerances.MODULE[dtype], f"{length} keys")


def test_a_row_is_the_same_bits_beside_a_longer_one():
    """Pages that only the neighbour needs leave a row's sums as they are."""
    rng = np.random.default_rng(1)
    shape = (2 * MAX_PAGES + 1, NUM_HEADS, PAGE_LEN, HEAD_DIM)
    k_pages, v_pages = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(2, NUM_HEADS, HEAD_DIM)), jnp.float32)
    page_table = jnp.arange(2 * MAX_PAGES).reshape(2, MAX_PAGES)
    attend = jax.jit(_attend_page_after_page)
    beside_short, beside_long = (attend(q, k_pages, v_pages, page_table, jnp.asarray([70, n])) for n in (1, 190))
    np.testing.assert_array_equal(beside_short[0], beside_long[0])
