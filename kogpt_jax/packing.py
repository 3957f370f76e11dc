"""Rows of tokens to the packed arrays that the phases over whole sequences read: little is computed for padding.

    rows a a a | b b | c, 4 tokens a chunk

    tokens   a a a b | b c . .
    begins   0 3 -   | - 0 1
    num_new  3 1 0   | 0 1 1

A row may go on in the next chunk; a chunk's size is rounded up to a bucket, so that a new length meets a program that
is compiled already. Under data parallelism each shard packs its own rows, and the shards' tokens stand one after
another. Chunks that one call reads are stacked: [C, T].
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar, no_type_check

import jax
import numpy as np
from jaxtyping import Array, Int

CHUNK_TOKENS = 8192  # a data shard's at a time: enough to keep a GPU's tensor cores busy, and little memory
_SMALLEST_BUCKET = 16
# Of a pipeline's chunks: with n stages, c chunks take c + n - 1 ticks, and small products do not fill a GPU.
_CHUNKS_PER_STAGE = 4
_SMALLEST_CHUNK = 256

_Row = TypeVar("_Row")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "begins", "num_new"], meta_fields=["max_len"]
)
@dataclasses.dataclass(frozen=True)
@no_type_check  # JAX puts other things than arrays into the same structure
class Packed:
    """New tokens of many rows, one after another."""

    tokens: Int[Array, "*C T"]  # of all shards; what belongs to no row stands behind the rows of its shard
    begins: Int[Array, "*C B"]  # each row's first token, counted from its shard's
    num_new: Int[Array, "*C B"]  # how many are the row's; may be 0
    max_len: int  # no row has more tokens with these and those before; a bucket, static under `jax.jit`


def pack(rows: Sequence[Sequence[int]], *, num_shards: int = 1, chunk_tokens: int = CHUNK_TOKENS) -> list[Packed]:
    """All tokens of rows, in chunks of at most ``chunk_tokens`` a shard.

    Args:
        rows: as many for each shard, those of the first shard first.
        num_shards: data shards.
        chunk_tokens: so many at most; at least ``max(map(len, rows))`` leave whole what fits into one chunk.

    Returns:
        The chunks, in which all but the last hold ``chunk_tokens`` of at least one shard.
    """
    rows_per_shard = len(rows) // num_shards
    lens = np.array([len(row) for row in rows]).reshape(num_shards, rows_per_shard)
    ends = np.cumsum(lens, axis=1)  # within the tokens of the shard
    starts = ends - lens
    chunks = []
    for first in range(0, int(ends[:, -1].max()), chunk_tokens):
        begins = np.clip(starts - first, 0, chunk_tokens)
        stops = np.clip(ends - first, 0, chunk_tokens)
        size = bucket(int(stops.max()))
        tokens = np.zeros((num_shards, size), np.int32)
        for index, row in enumerate(rows):
            place = divmod(index, rows_per_shard)
            read = first + begins[place] - starts[place]  # of the row, by the chunks before
            count = stops[place] - begins[place]
            if count > 0:
                tokens[place[0], begins[place] : stops[place]] = row[read : read + count]
        num_new = np.maximum(stops - begins, 0)
        longest = int(np.max(np.where(num_new > 0, first + stops - starts, 0)))
        # NumPy's, which `jax.jit` puts where they belong: on one device or on many.
        arrays: Any = {"tokens": tokens, "begins": begins, "num_new": num_new}
        arrays = {name: array.reshape(-1).astype(np.int32) for name, array in arrays.items()}
        chunks.append(Packed(**arrays, max_len=bucket(longest)))
    return chunks


def stack(chunks: Sequence[Packed], *, num_shards: int = 1) -> Packed:
    """Chunks over the same rows as one structure with a leading axis, of the size of the largest."""
    by_shard = [np.asarray(packed.tokens).reshape(num_shards, -1) for packed in chunks]
    size = max(tokens.shape[1] for tokens in by_shard)
    padded = np.zeros((len(chunks), num_shards, size), np.int32)
    for chunk, of_chunk in zip(padded, by_shard, strict=True):
        chunk[:, : of_chunk.shape[1]] = of_chunk
    tokens: Any = padded.reshape(len(chunks), -1)
    begins: Any = np.stack([packed.begins for packed in chunks])
    num_new: Any = np.stack([packed.num_new for packed in chunks])
    return Packed(tokens, begins, num_new, max(packed.max_len for packed in chunks))


def pack_prompts(rows: Sequence[Sequence[int]], *, num_shards: int, num_stages: int) -> list[Packed]:
    """Prompts as calls of `decoding.prefill` take them: stacked chunks. Over one stage each call has one chunk; a
    pipeline is kept full by as many chunks as pay, `_CHUNKS_PER_STAGE` for each stage at most."""
    chunk_tokens, together = CHUNK_TOKENS, 1
    if num_stages > 1:
        together = _CHUNKS_PER_STAGE * num_stages
        longest = int(np.array([len(row) for row in rows]).reshape(num_shards, -1).sum(axis=1).max())
        chunk_tokens = min(CHUNK_TOKENS, max(_SMALLEST_CHUNK, bucket(-(-longest // together))))
    chunks = pack(rows, num_shards=num_shards, chunk_tokens=chunk_tokens)
    return [stack(chunks[first : first + together], num_shards=num_shards) for first in range(0, len(chunks), together)]


def num_whole_chunks(num_rows: int, num_stages: int) -> int:
    """How many chunks of `pack_whole` keep a pipeline full; one over one stage."""
    return 1 if num_stages == 1 else min(power_bucket(num_rows, 1), _CHUNKS_PER_STAGE * num_stages)


def pack_whole(rows: Sequence[Sequence[int]], *, num_shards: int, num_chunks: int) -> Packed:
    """Rows that are read at once and not gone on with, as stacked chunks of whole rows.

    Args:
        rows: as many for each shard of each chunk; those of the first chunk first, and of its first shard.
    """
    (packed,) = pack(rows, num_shards=num_shards * num_chunks, chunk_tokens=sum(map(len, rows)))
    return jax.tree.map(lambda array: array.reshape(num_chunks, -1), packed)


def deal(rows: Sequence[_Row], num_shards: int, *, multiple: int = 1) -> list[_Row | None]:
    """Rows in the order of their shards, dealt out one by one, so that like neighbours are shared evenly; with None as
    padding to ``multiple`` times a power of two a shard.

        a b c, 2 shards  ->  a c | b None
    """
    dealt = [*rows, *[None] * (power_bucket(len(rows), num_shards * multiple) - len(rows))]
    return [row for shard in range(num_shards) for row in dealt[shard::num_shards]]


def bucket(size: int) -> int:
    """The least of 16, 32, 48, 64, 96, 128, 192 ... that is at least ``size``."""
    return min(power_bucket(size, _SMALLEST_BUCKET), power_bucket(size, 3 * _SMALLEST_BUCKET))


def power_bucket(size: int, smallest: int) -> int:
    """The least power of two times ``smallest`` that is at least ``size``."""
    return smallest * 2 ** max(0, math.ceil(math.log2(size / smallest)))
