"""Causal attention of many new tokens a row over paged keys and values, with rotary embedding and cache append in
front."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from custom_ops import _arguments, _library
from custom_ops import pages as kv_pages
from custom_ops.decode_attention import HEAD_DIMS, values_and_scales
from custom_ops.quantization import QuantizedArray
from custom_ops.rotary import apply_rotary

MAX_ATTENTION_ROWS = 1024  # with implementation "ffi"

# The CUDA kernels list tiles of this many queries of a row, or of more.
_MIN_TILE_QUERIES = 64
_ROW_COLUMNS = 8  # of qkv are 16 bytes, at which the kernels' rows must begin
# The reference takes tiles of this many queries of a row, and so many together, but no more than that, that their
# scores, [tiles, N, block, max_pages * page_len], take these bytes at most.
QUERY_BLOCK = 128
_TILES_TOGETHER = 16
SCORE_BYTES = 1 << 26


def prefill_attention(
    qkv: Float[Array, "total_tokens qkv_dim"],
    rotary: tuple[Float32[Array, "total_tokens R"], Float32[Array, "total_tokens R"]],
    k_pages: kv_pages.Pages,
    v_pages: kv_pages.Pages,
    page_table: Int32[Array, "B max_pages"],
    begins: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    act: Float[Array, "total_tokens act_dim"],
    *,
    max_new: int | None = None,
    semaphores: Int32[Array, " NUM_SEMAPHORES"] | None = None,
    implementation: str,
) -> tuple[Array, kv_pages.Pages, kv_pages.Pages, Array | None]:
    """Rotates the new q and k, appends k and v, and attends to the cached tokens and causally to the new ones.

    Row b's new tokens are the ``num_new[b]`` ones from ``begins[b]`` on. The i-th of them, at t = begins[b] + i, has
    position p = lengths[b] + i: the first 2 R values of each head of q and k are rotated in neighbouring pairs and
    rounded to dtype, k and v are written into page ``page_table[b, p // page_len]`` at offset ``p % page_len``, and

        act[t, n H : (n + 1) H] = sum_j softmax_j(q . k_j / sqrt(H)) v_j    over j = 0 .. p, softmax in f32

        # page_len=4, begins=[3,0], num_new=[2,3], lengths=[5,0], page_table=[[2,0],[1,·]]
        # token        0       1       2       3       4       5
        # row, p       1, 0    1, 1    1, 2    0, 5    0, 6    none
        # is written   1, 0    1, 1    1, 2    0, 1    0, 2    nowhere     (page, offset)
        # attends to   0       0 1     0 1 2   0 .. 5  0 .. 6

    So rows may be packed or padded to one length, and a prefix of a row may be in the cache from an earlier call or
    from a page that rows share. What does not belong to a row's tokens stays as it is: act of tokens of no row, the
    columns from N H on, cache slots beside the new ones (the reference writes to the scratch page, see `pages`). What
    other slots and tokens of no row hold never gets into a result.

    INT8 pages (`QuantizedArray`) are those of `decode_attention`: each k_j and v_j of the sum is integer times scale,
    those of the new tokens too, so that a prompt read in chunks is the prompt read at once.

    Args:
        qkv: q, k and v of each token one after another, each [N, H] (N and H are those of the pages). There may be
            more columns behind them, which are not looked at: a product need not be cut for the kernels.
        rotary: (cos, sin) of the angles at each token's position; R may be 0.
        k_pages: the cache in dtype or INT8, updated in place if it is donated.
        v_pages: likewise.
        page_table: pages of each row in order; each entry that the row's tokens need is in [0, pages - 1), the others
            are not looked at. A page that a row writes to stands in no other row.
        begins: the first new token of each row; rows share no token.
        num_new: new tokens of each row; may be 0.
        lengths: tokens in the cache before them; with them at most max_pages * page_len.
        act: where the result goes, aliased: its first N H columns are written, the others stay as they are.
        max_new: no row has more new tokens (default: as many as there are tokens). A bound makes fewer empty tiles and
            for the reference far less work.
        semaphores: passed through: the kernels of this op do not count.
        implementation: "reference" (`jax.numpy`, any sizes) or "ffi": NVIDIA GPUs, at most 1024 rows, head_dim 64, 128
            or 256, page_len a multiple of 64, fp16 and bf16, INT8 pages too.

    Returns:
        (act, k_pages, v_pages, semaphores).

    Raises:
        ValueError: an argument does not fit the others, or the implementation does not support it. Values of
            ``page_table``, ``begins``, ``num_new`` and ``lengths`` are not checked.

    Rotary embedding is Su et al.'s (2021); the kernels follow FlashAttention-2 and -3 (Dao 2023, Shah et al. 2024).
    """
    _arguments.check_implementation(implementation)
    _arguments.check_rank("page_table", page_table, 2)
    _arguments.check_rank("qkv", qkv, 2)
    _arguments.check_rank("k_pages", k_pages, 4)
    _arguments.check_attention(
        qkv,
        rotary,
        k_pages,
        v_pages,
        page_table,
        act,
        qkv.shape[0],
        max(qkv.shape[1], _qkv_dim(k_pages)),
        begins=begins,
        num_new=num_new,
        lengths=lengths,
    )
    if max_new is not None and max_new < 0:
        raise ValueError(f"max_new must not be negative, got {max_new}")
    run = prefill_attention_reference if implementation == "reference" else prefill_attention_ffi
    act, k_pages, v_pages = run(
        qkv, rotary, k_pages, v_pages, page_table, begins, num_new, lengths, act, max_new=max_new
    )
    return act, k_pages, v_pages, semaphores


def _qkv_dim(pages: kv_pages.Pages) -> int:
    _, num_heads, _, head_dim = pages.shape
    return 3 * num_heads * head_dim


def token_rows(
    begins: Int32[Array, " B"], num_new: Int32[Array, " B"], total_tokens: int
) -> tuple[Int32[Array, " total_tokens"], Int32[Array, " total_tokens"], Bool[Array, " total_tokens"]]:
    """Whose the packed tokens are: the row of each, which of the row's new tokens it is, and whether it is one. Tokens
    of no row come with row 0 and index 0."""
    index = jnp.arange(total_tokens, dtype=jnp.int32) - begins[:, None]
    is_of_row = (index >= 0) & (index < num_new[:, None])
    row = jnp.argmax(is_of_row, axis=0).astype(jnp.int32)
    is_valid = jnp.any(is_of_row, axis=0)
    return row, jnp.where(is_valid, jnp.take_along_axis(index, row[None], axis=0)[0], 0), is_valid


def prefill_attention_reference(
    qkv: Float[Array, "total_tokens qkv_dim"],
    rotary: tuple[Array, Array],
    k_pages: kv_pages.Pages,
    v_pages: kv_pages.Pages,
    page_table: Int32[Array, "B max_pages"],
    begins: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    act: Float[Array, "total_tokens act_dim"],
    *,
    max_new: int | None = None,
) -> tuple[Array, kv_pages.Pages, kv_pages.Pages]:
    """`prefill_attention` in `jax.numpy`, a few tiles at a time. Tokens of no row go to the scratch page."""
    _, num_heads, page_len, head_dim = k_pages.shape
    (total_tokens, _), (batch, max_pages) = act.shape, page_table.shape
    max_new = total_tokens if max_new is None else min(max_new, total_tokens)
    if batch == 0 or max_new == 0:
        return act, k_pages, v_pages
    qkv = qkv[:, : _qkv_dim(k_pages)]
    q, k, v = jnp.moveaxis(qkv.reshape(1, total_tokens, 3, num_heads, head_dim), 2, 0)
    cos, sin = (table[None, :, None, :] for table in rotary)
    q, k = apply_rotary(q, k, (cos, sin))

    num_new = jnp.clip(num_new, 0, jnp.maximum(max_pages * page_len - lengths, 0))
    row_of_token, index, is_valid = token_rows(begins, num_new, total_tokens)
    positions = (lengths[row_of_token] + index)[:, None]
    where = (page_table[row_of_token], positions, is_valid[:, None])
    k_pages = kv_pages.append(k_pages, k.swapaxes(0, 1), *where)
    v_pages = kv_pages.append(v_pages, v.swapaxes(0, 1), *where)

    # In tiles of some queries of one row, as many as the rows need at most: a row without new tokens has none.
    block = min(max_new, QUERY_BLOCK)
    num_tiles = min(total_tokens // block + batch, batch * -(-max_new // block))
    together = min(num_tiles, _TILES_TOGETHER, max(1, SCORE_BYTES // (4 * num_heads * block * max_pages * page_len)))
    num_groups = -(-num_tiles // together)
    ends = jnp.cumsum(-(-num_new // block))  # of the rows' tiles
    first_tiles = ends - -(-num_new // block)

    def attend(tile: Array) -> Array:
        row = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), batch - 1)
        start = (tile - first_tiles[row]) * block
        is_token = kv_pages.valid_tokens((lengths + num_new)[row][None], max_pages, page_len)[0]
        # A page that no token needs may be named by anything.
        page_ids = jnp.where(is_token[:, 0], page_table[row], k_pages.shape[0] - 1)
        keys, values = (kv_pages.gather(pages, page_ids[None])[0] for pages in (k_pages, v_pages))
        values = kv_pages.mask_values(values, is_token[:, None])
        queries = jnp.minimum(begins[row] + start + jnp.arange(block), total_tokens - 1)
        scores = kv_pages.scores("tnh,mnph->tmnp", q[0, queries], keys) / math.sqrt(head_dim)
        is_visible = kv_pages.valid_tokens(lengths[row] + start + 1 + jnp.arange(block), max_pages, page_len)
        scores = jnp.where(is_visible[:, :, None], scores, -jnp.inf)
        probs = jnp.exp(scores - jnp.max(scores, axis=(1, 3), keepdims=True))
        out = kv_pages.weighted_sum("tmnp,mnph->tnh", probs, values)
        return (out / jnp.sum(probs, axis=(1, 3))[..., None]).astype(act.dtype)

    def attend_group(group: Array, out: Array) -> Array:
        tiles = jax.vmap(attend)(group * together + jnp.arange(together))
        return jax.lax.dynamic_update_slice_in_dim(out, tiles, group * together, axis=0)

    width = num_heads * head_dim
    out = jnp.zeros((num_groups * together, block, num_heads, head_dim), act.dtype)
    out = jax.lax.fori_loop(0, -(-ends[-1] // together), attend_group, out)
    place = first_tiles[row_of_token] * block + index
    out = jnp.where(is_valid[:, None], out.reshape(-1, width)[jnp.where(is_valid, place, 0)], act[:, :width])
    return jnp.concatenate([out, act[:, width:]], axis=1), k_pages, v_pages


def prefill_attention_ffi(
    qkv: Float[Array, "total_tokens qkv_dim"],
    rotary: tuple[Array, Array],
    k_pages: kv_pages.Pages,
    v_pages: kv_pages.Pages,
    page_table: Int32[Array, "B max_pages"],
    begins: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    act: Float[Array, "total_tokens act_dim"],
    *,
    max_new: int | None = None,
) -> tuple[Array, kv_pages.Pages, kv_pages.Pages]:
    """`prefill_attention` through XLA's FFI (csrc/prefill_attention.h): the CUDA handler on an NVIDIA GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    _, _, page_len, head_dim = k_pages.shape
    total_tokens, batch = act.shape[0], page_table.shape[0]
    pages_dtype = jnp.int8 if isinstance(k_pages, QuantizedArray) else None
    problem = prefill_attention_ffi_problem(
        platform="gpu", dtype=qkv.dtype, head_dim=head_dim, page_len=page_len, batch=batch, pages_dtype=pages_dtype
    )
    if problem is not None:
        raise ValueError(f'with implementation "ffi" {problem}: k_pages has shape {k_pages.shape}')
    if qkv.shape[1] % _ROW_COLUMNS:
        qkv = qkv[:, : _qkv_dim(k_pages)]
    (k_values, k_scales), (v_values, v_scales) = map(values_and_scales, (k_pages, v_pages))
    max_new = total_tokens if max_new is None else min(max_new, total_tokens)
    num_tiles = min(total_tokens // _MIN_TILE_QUERIES + batch, batch * -(-max_new // _MIN_TILE_QUERIES))
    results = (
        jax.ShapeDtypeStruct(act.shape, act.dtype),
        *(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (k_values, k_scales, v_values, v_scales)),
        jax.ShapeDtypeStruct((num_tiles, 4), jnp.int32),
    )
    aliases = {11: 0, 3: 1, 5: 3}
    if isinstance(k_pages, QuantizedArray):
        aliases |= {4: 2, 6: 4}
    call = jax.ffi.ffi_call("kogpt_prefill_attention", results, input_output_aliases=aliases)
    act, k_values, k_scales, v_values, v_scales, _ = call(
        qkv,
        *rotary,
        k_values,
        k_scales,
        v_values,
        v_scales,
        page_table,
        begins,
        num_new,
        lengths,
        act,
        max_new=np.int64(max_new),
    )
    if isinstance(k_pages, QuantizedArray):
        return act, QuantizedArray(k_values, k_scales), QuantizedArray(v_values, v_scales)
    return act, k_values, v_values


def prefill_attention_ffi_problem(
    *, platform: str, dtype: Any, head_dim: int, page_len: int, batch: int = 1, pages_dtype: Any = None
) -> str | None:
    """Why "ffi" cannot attend to such a cache on this machine, or None if it can; arguments as those of
    `decode_attention_ffi_problem`, and ``batch`` rows."""
    if platform != "gpu":
        return f"prefill_attention runs on NVIDIA GPUs only, not on {platform}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be in {HEAD_DIMS}, got {head_dim}"
    if page_len % 64:
        return f"page_len must be a multiple of 64, got {page_len}"
    if batch > MAX_ATTENTION_ROWS:
        return f"there must be at most {MAX_ATTENTION_ROWS} rows, got {batch}"
    if problem := _arguments.ffi_dtype_problem(platform, np.dtype(dtype)):
        return problem
    if problem := _arguments.ffi_pages_problem(dtype, pages_dtype):
        return problem
    library = _library.load(platform)
    return None if library.problem is None else f"prefill_attention needs the CUDA library: {library.problem}"
