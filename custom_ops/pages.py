"""Reading and writing paged keys and values: pages of one size, and a table with the pages of each row in order.

    page_table = [[0, 1], [2, 3]], lengths = [70, 3], 64 tokens a page
    row 0: page 0 k0 .. k63 | page 1 k64 .. k69 . . .
    row 1: page 2 k0 k1 k2 . . . | page 3 . . .

Token j of row b lies in page ``page_table[b, j // page_len]`` at offset ``j % page_len``, and is valid iff
``j < lengths[b]``. The last page of the pool is a scratch page that stands in no page table: writes that shall have no
effect go there.

Pages in INT8 are a `QuantizedArray`: beside the values [pages, N, page_len, H] a scale a token and head, in f32,
[pages, N, page_len, 1]. So the scales are paged as values with H = 1 are, and whatever goes over the leaves of a cache
takes them along.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from custom_ops import numerics
from custom_ops.quantization import QuantizedArray, quantize_weight

Pages = Float[Array, "pages N page_len H"] | QuantizedArray


def append(
    pages: Pages,
    new: Float[Array, "B T N H"],
    page_table: Int[Array, "B max_pages"],
    positions: Int[Array, "B T"],
    is_valid: Bool[Array, "B T"],
) -> Pages:
    """Writes ``new[b, t]`` where token ``positions[b, t]`` of row b lies; tokens that are not valid go to the
    scratch page. Into INT8 pages each head of a token is rounded as `quantize_weight` rounds an output of a weight:
    symmetric, with the scale max |new| / 127 over H."""
    page_len = pages.shape[2]
    page_slot = jnp.minimum(positions // page_len, page_table.shape[1] - 1)
    page_ids = jnp.take_along_axis(page_table, page_slot, axis=1)
    page_ids = jnp.where(is_valid, page_ids, pages.shape[0] - 1)
    offsets = positions % page_len

    def write(pages: Shaped[Array, "pages N page_len H"], new: Shaped[Array, "B T N H"]) -> Array:
        if positions.size == 1:
            # XLA makes of a scatter of one index this update and a second kernel that checks bounds: 2 us a layer on an
            # H100.
            start = (page_ids[0, 0], 0, offsets[0, 0], 0)
            return jax.lax.dynamic_update_slice(pages, new.swapaxes(1, 2), start)
        return pages.at[page_ids, :, offsets].set(new, mode="promise_in_bounds", wrap_negative_indices=False)

    if isinstance(pages, QuantizedArray):
        return jax.tree.map(write, pages, quantize_weight(new))
    return write(pages, new.astype(pages.dtype))


def gather(
    pages: Pages, page_table: Int[Array, "B max_pages"]
) -> Float[Array, "B max_pages N page_len H"] | QuantizedArray:
    """The pages of each row in order, valid tokens and others."""
    return jax.tree.map(
        lambda part: part.at[page_table].get(mode="promise_in_bounds", wrap_negative_indices=False), pages
    )


def valid_tokens(lengths: Int[Array, " B"], max_pages: int, page_len: int) -> Bool[Array, "B max_pages {page_len}"]:
    """Which tokens of each row's pages are valid."""
    tokens = jnp.arange(max_pages * page_len).reshape(max_pages, page_len)
    return tokens < lengths[:, None, None]


def scores(equation: str, q: Float[Array, "..."], k: Float[Array, "*pages H"] | QuantizedArray) -> Float[Array, "..."]:
    """Products of queries and keys in f32; ``equation`` ends in the axes of k's tokens. INT8 values are exact in every
    dtype, and their scales multiply the sums."""
    if not isinstance(k, QuantizedArray):
        return numerics.einsum(equation, q, k)
    return numerics.einsum(equation, q, k.qvalue.astype(q.dtype)) * k.scale[..., 0]


def mask_values(
    v: Float[Array, "*pages H"] | QuantizedArray, is_valid: Bool[Array, "..."]
) -> Float[Array, "*pages H"] | QuantizedArray:
    """Zeros where a token is not valid: what its slot holds may be NaN, and 0 NaN is NaN."""
    if not isinstance(v, QuantizedArray):
        return jnp.where(is_valid[..., None], v, 0)
    return QuantizedArray(v.qvalue, jnp.where(is_valid[..., None], v.scale, 0))


def weighted_sum(
    equation: str, weights: Float[Array, "..."], v: Float[Array, "*pages H"] | QuantizedArray
) -> Float[Array, "..."]:
    """Values weighted and summed in f32; ``weights`` end in the axes of v's tokens, and are rounded to v's dtype.

    With INT8 values they take the scales along in f32: in fp16 a small scale would make them subnormal.
    """
    if not isinstance(v, QuantizedArray):
        return numerics.einsum(equation, weights.astype(v.dtype), v)
    return numerics.einsum(equation, weights * v.scale[..., 0], v.qvalue.astype(jnp.float32))
