"""Attention of one query token a row over paged keys and values, with rotary embedding and cache append in front."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from custom_ops import _arguments, _library, _outputs
from custom_ops import pages as kv_pages
from custom_ops.quantization import QuantizedArray
from custom_ops.rotary import apply_rotary
from custom_ops.semaphores import check_semaphores

HEAD_DIMS = (64, 128, 256)  # with implementation "ffi"

# The CUDA kernel cuts the keys into pieces of this many, whatever the batch, so that a row's sums do not depend on its
# neighbours.
KEYS_PER_SPLIT = 64


def decode_attention(
    qkv: Float[Array, "B qkv_dim"],
    rotary: tuple[Float32[Array, "B R"], Float32[Array, "B R"]],
    k_pages: kv_pages.Pages,
    v_pages: kv_pages.Pages,
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    act: Float[Array, "B act_dim"],
    *,
    semaphores: Int32[Array, " NUM_SEMAPHORES"] | None = None,
    prefetch_cache: bool = False,
    leaves_room: bool = False,
    implementation: str,
) -> tuple[Array, kv_pages.Pages, kv_pages.Pages, Array]:
    """Rotates the new q and k, appends k and v, and attends to all of the row.

    For each row b with num_new[b] = 1 the new token has position p = lengths[b]: the first 2 R values of each head of
    q and k are rotated in neighbouring pairs and rounded to dtype, k and v are written into page
    ``page_table[b, p // page_len]`` at offset ``p % page_len``, and

        act[b, n H : (n + 1) H] = sum_j softmax_j(q . k_j / sqrt(H)) v_j    over j = 0 .. p, softmax in f32

        # page_len=2, page_table=[[3,0],[1,2]], lengths=[1,2], num_new=[1,0]
        # row 0 writes page 3, offset 1, and attends to tokens 0, 1      row 1 writes nothing and gets zeros

    Tokens beyond p are never read into a result, whatever they hold.

    With INT8 pages (`QuantizedArray`, see `pages`) each head of the rounded k and of v is rounded once more, to
    integers in [-127, 127] with the scale max |.| / 127 in f32 (1 for zeros; halves to even), and k_j and v_j are
    integer times scale, those of the token itself too: no token's result depends on which of those before it were
    written in the same call. A head with a value that is not finite gets a scale that is not.

    Args:
        qkv: q, k and v of each row one after another, each [N, H] (N and H are those of the pages).
        rotary: (cos, sin) of the angles at the new token's position; R may be 0.
        k_pages: the cache in dtype or INT8, updated in place if it is donated.
        v_pages: likewise.
        page_table: pages of each row in order; of a row with num_new 0 it is not looked at, else each entry that the
            p + 1 tokens need is in [0, pages - 1): the last page is the scratch page (see `pages`). No page stands in
            two rows.
        lengths: tokens in the cache before this one, less than max_pages * page_len where num_new is 1.
        num_new: 1 or 0.
        act: where the result goes, aliased: its first N H columns are written, the others stay as they are.
        semaphores: from `make_semaphores` or the op before; "reference" passes them through and takes None.
        prefetch_cache: a promise that no kernel just ahead writes the pages or the page table (in a decode step the op
            before is a product): the CUDA kernel may then read them while the kernel ahead still runs.
        leaves_room: says that the op behind is a `linear` with ``early`` columns: the CUDA kernel then has half the
            blocks where the rows' pages hold at most 256 tokens, so that those of the product find room beside them.
            The results are the same bits.
        implementation: "reference" (`jax.numpy`, any sizes) or "ffi": head_dim 64, 128 or 256; page_len a multiple of
            16; fp16 and bf16, on a CPU f32 too.

    Returns:
        (act, k_pages, v_pages, semaphores).

    Raises:
        ValueError: an argument does not fit the others, or the implementation does not support it. Values of
            ``page_table``, ``lengths`` and ``num_new`` are not checked.

    Rotary embedding is Su et al.'s (2021); split keys with an online softmax are Milakov and Gimelshein's (2018) and
    FlashDecoding's (Dao et al. 2023).
    """
    _arguments.check_implementation(implementation)
    _arguments.check_rank("page_table", page_table, 2)
    _arguments.check_attention(
        qkv, rotary, k_pages, v_pages, page_table, act, page_table.shape[0], lengths=lengths, num_new=num_new
    )
    arguments = (qkv, rotary, k_pages, v_pages, page_table, lengths, num_new, act)
    if implementation == "reference":
        return decode_attention_reference(*arguments, semaphores=semaphores)
    return decode_attention_ffi(
        *arguments, semaphores=semaphores, prefetch_cache=prefetch_cache, leaves_room=leaves_room
    )


def decode_attention_reference(
    qkv: Float[Array, "B qkv_dim"],
    rotary: tuple[Array, Array],
    k_pages: kv_pages.Pages,
    v_pages: kv_pages.Pages,
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    act: Float[Array, "B act_dim"],
    *,
    semaphores: Any = None,  # passed through
) -> tuple[Array, kv_pages.Pages, kv_pages.Pages, Array]:
    """`decode_attention` in `jax.numpy`. Appends of rows with num_new 0 go to the scratch page."""
    _, num_heads, _, head_dim = k_pages.shape
    batch = qkv.shape[0]
    q, k, v = jnp.moveaxis(qkv.reshape(batch, 1, 3, num_heads, head_dim), 2, 0)
    cos, sin = (table[:, None, None, :] for table in rotary)
    q, k = apply_rotary(q, k, (cos, sin))
    positions, is_valid = lengths[:, None], num_new[:, None] > 0
    k_pages = kv_pages.append(k_pages, k, page_table, positions, is_valid)
    v_pages = kv_pages.append(v_pages, v, page_table, positions, is_valid)
    out = attend(q[:, 0], k_pages, v_pages, page_table, lengths + num_new)
    out = jnp.where(is_valid[:, :, None], out, 0).reshape(batch, num_heads * head_dim)
    # Not an update of `act`: XLA finds the concatenation in `linear_reference` behind this and leaves one of the two.
    act = jnp.concatenate([out.astype(act.dtype), act[:, num_heads * head_dim :]], axis=1)
    return act, k_pages, v_pages, semaphores


def decode_attention_ffi(
    qkv: Float[Array, "B qkv_dim"],
    rotary: tuple[Array, Array],
    k_pages: kv_pages.Pages,
    v_pages: kv_pages.Pages,
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    act: Float[Array, "B act_dim"],
    *,
    semaphores: Array | None = None,
    prefetch_cache: bool = False,
    leaves_room: bool = False,
) -> tuple[Array, kv_pages.Pages, kv_pages.Pages, Array]:
    """`decode_attention` through XLA's FFI (csrc/decode_attention.h): the Host handler on a CPU, the CUDA handler on an
    NVIDIA GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    _library.register_targets()
    semaphores = check_semaphores(semaphores)
    _, num_heads, page_len, head_dim = k_pages.shape
    batch, max_pages = page_table.shape
    if problem := shape_problem(head_dim, page_len):
        raise ValueError(f'with implementation "ffi" {problem}: k_pages has shape {k_pages.shape}')
    (k_values, k_scales), (v_values, v_scales) = map(values_and_scales, (k_pages, v_pages))
    num_splits = -(-max_pages * page_len // KEYS_PER_SPLIT)
    results = (
        jax.ShapeDtypeStruct(act.shape, act.dtype),
        *(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (k_values, k_scales, v_values, v_scales)),
        # Sized for CUDA on every platform, since the platform is not known yet: the Host handler never touches it.
        jax.ShapeDtypeStruct((batch * num_heads * num_splits * (head_dim + 2),), jnp.float32),
        jax.ShapeDtypeStruct(semaphores.shape, semaphores.dtype),
    )
    aliases = {10: 0, 3: 1, 5: 3, 11: 6}
    if isinstance(k_pages, QuantizedArray):
        aliases |= {4: 2, 6: 4}
    call = jax.ffi.ffi_call("kogpt_decode_attention", results, input_output_aliases=aliases)
    act, k_values, k_scales, v_values, v_scales, _, semaphores = call(
        qkv,
        *rotary,
        k_values,
        k_scales,
        v_values,
        v_scales,
        page_table,
        lengths,
        num_new,
        act,
        semaphores,
        prefetch_cache=bool(prefetch_cache),
        leaves_room=bool(leaves_room),
    )
    if isinstance(k_pages, QuantizedArray):
        return act, QuantizedArray(k_values, k_scales), QuantizedArray(v_values, v_scales), semaphores
    return act, k_values, v_values, semaphores


def decode_attention_ffi_problem(
    *, platform: str, dtype: Any, head_dim: int, page_len: int, pages_dtype: Any = None
) -> str | None:
    """Why "ffi" cannot attend to such a cache on this machine, or None if it can.

    Args:
        platform: "cpu" or "gpu".
        dtype: of the activations.
        head_dim: values a head.
        page_len: tokens a page.
        pages_dtype: dtype, which is the default, or INT8.
    """
    return (
        _library.load(platform).problem
        or _arguments.ffi_dtype_problem(platform, np.dtype(dtype))
        or _arguments.ffi_pages_problem(dtype, pages_dtype)
        or shape_problem(head_dim, page_len)
    )


def values_and_scales(pages: kv_pages.Pages) -> tuple[Array, Array]:
    """The two arrays that a kernel takes for pages; without scales the second has no elements."""
    if isinstance(pages, QuantizedArray):
        return pages.qvalue, pages.scale
    return pages, _outputs.or_empty(None, jnp.float32)


def shape_problem(head_dim: int, page_len: int) -> str | None:
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be in {HEAD_DIMS}, got {head_dim}"
    return f"page_len must be a multiple of 16, got {page_len}" if page_len % 16 else None


def attend(
    q: Float[Array, "B N H"],
    k_pages: kv_pages.Pages,
    v_pages: kv_pages.Pages,
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, " B"],
) -> Float[Array, "B N H"]:
    """One query a row attends to the row's first ``lengths[b]`` keys, at least one; scores and softmax in f32.

    On a CPU a loop goes over the pages that are used; elsewhere all pages of the table are multiplied at once, because
    there a loop whose end is computed makes the host wait.
    """
    return jax.lax.platform_dependent(
        q, k_pages, v_pages, page_table, lengths, cpu=_attend_page_after_page, default=_attend_all_pages
    )


def _attend_all_pages(
    q: Array, k_pages: kv_pages.Pages, v_pages: kv_pages.Pages, page_table: Array, lengths: Array
) -> Array:
    """Each page is a product of its own (batch axes B, max_pages, N), so that the pages are multiplied as they lie;
    putting a row's pages in one piece first would copy and transpose the cache every step."""
    max_pages, page_len = page_table.shape[1], k_pages.shape[2]
    k = kv_pages.gather(k_pages, page_table)
    v = kv_pages.gather(v_pages, page_table)
    is_valid = kv_pages.valid_tokens(lengths, max_pages, page_len)[:, :, None, :]  # [B, max_pages, 1, page_len]
    q_by_page = jnp.broadcast_to(q[:, None], (q.shape[0], max_pages, *q.shape[1:]))
    scores = kv_pages.scores("bmnh,bmnph->bmnp", q_by_page, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(is_valid, scores, -jnp.inf)
    probs = jnp.exp(scores - jnp.max(scores, axis=(1, 3), keepdims=True))
    by_page = kv_pages.weighted_sum("bmnp,bmnph->bmnh", probs, kv_pages.mask_values(v, is_valid))
    # Or XLA puts these sums into whatever reads them, one thread an output: 30 times slower at 8 rows on an H100.
    by_page, total = jax.lax.optimization_barrier((by_page, jnp.sum(probs, axis=(1, 3))))
    return (jnp.sum(by_page, axis=1) / total[..., None]).astype(q.dtype)


def _attend_page_after_page(
    q: Array, k_pages: kv_pages.Pages, v_pages: kv_pages.Pages, page_table: Array, lengths: Array
) -> Array:
    """Online softmax (Milakov and Gimelshein 2018): maximum, sum and output so far are rescaled with each page. A page
    without a valid token for a row leaves that row's as they are, bit for bit."""
    page_len = k_pages.shape[2]

    def add_page(slot: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, out = so_far
        page_ids = page_table[:, slot][:, None]
        k, v = kv_pages.gather(k_pages, page_ids)[:, 0], kv_pages.gather(v_pages, page_ids)[:, 0]
        is_valid = (slot * page_len + jnp.arange(page_len) < lengths[:, None])[:, None]  # [B, 1, page_len]
        scores = kv_pages.scores("bnh,bnph->bnp", q, k) / math.sqrt(q.shape[-1])
        scores = jnp.where(is_valid, scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        rescale, probs = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum[..., None])
        weighted = kv_pages.weighted_sum("bnp,bnph->bnh", probs, kv_pages.mask_values(v, is_valid))
        total = total * rescale + jnp.sum(probs, axis=-1)
        return new_maximum, total, out * rescale[..., None] + weighted

    num_pages = (jnp.max(lengths) + page_len - 1) // page_len
    lowest = jnp.full(q.shape[:2], jnp.finfo(jnp.float32).min)  # finite: -inf less -inf is NaN
    start = (lowest, jnp.zeros(q.shape[:2], jnp.float32), jnp.zeros(q.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(0, num_pages, add_page, start)
    return (out / total[..., None]).astype(q.dtype)
