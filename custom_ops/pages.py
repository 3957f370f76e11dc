"""Reading and writing paged keys and values: pages of one size, and a table with the pages of each row in order.

    page_table = [[0, 1], [2, 3]], lengths = [70, 3], 64 tokens a page
    row 0: page 0 k0 .. k63 | page 1 k64 .. k69 . . .
    row 1: page 2 k0 k1 k2 . . . | page 3 . . .

Token j of row b lies in page ``page_table[b, j // page_len]`` at offset ``j % page_len``, and is valid iff
``j < lengths[b]``. The last page of the pool is a scratch page that stands in no page table: writes that shall have no
effect go there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def append(
    pages: Float[Array, "pages N page_len H"],
    new: Float[Array, "B T N H"],
    page_table: Int[Array, "B max_pages"],
    positions: Int[Array, "B T"],
    is_valid: Bool[Array, "B T"],
) -> Float[Array, "pages N page_len H"]:
    """Writes ``new[b, t]`` where token ``positions[b, t]`` of row b lies; tokens that are not valid go to the
    scratch page."""
    page_len = pages.shape[2]
    page_slot = jnp.minimum(positions // page_len, page_table.shape[1] - 1)
    page_ids = jnp.take_along_axis(page_table, page_slot, axis=1)
    page_ids = jnp.where(is_valid, page_ids, pages.shape[0] - 1)
    new = new.astype(pages.dtype)
    if positions.size == 1:
        # XLA makes of a scatter of one index this update and a second kernel that checks bounds: 2 us a layer on an
        # H100.
        start = (page_ids[0, 0], 0, positions[0, 0] % page_len, 0)
        return jax.lax.dynamic_update_slice(pages, new.swapaxes(1, 2), start)
    return pages.at[page_ids, :, positions % page_len].set(new, mode="promise_in_bounds", wrap_negative_indices=False)


def gather(
    pages: Float[Array, "pages N page_len H"], page_table: Int[Array, "B max_pages"]
) -> Float[Array, "B max_pages N page_len H"]:
    """The pages of each row in order, valid tokens and others."""
    return pages.at[page_table].get(mode="promise_in_bounds", wrap_negative_indices=False)


def valid_tokens(lengths: Int[Array, " B"], max_pages: int, page_len: int) -> Bool[Array, "B max_pages {page_len}"]:
    """Which tokens of each row's pages are valid."""
    tokens = jnp.arange(max_pages * page_len).reshape(max_pages, page_len)
    return tokens < lengths[:, None, None]
