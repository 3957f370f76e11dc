"""The key-value cache: preallocated pages of one size, a page table per row, and how many keys of a row are valid.

    page_table = [[0, 1], [2, 3]], lengths = [70, 3], 64 tokens a page
    row 0: page 0 k0 .. k63 | page 1 k64 .. k69 . . .
    row 1: page 2 k0 k1 k2 . . . | page 3 . . .

Tokens are left-aligned: token j of row b lies in page ``page_table[b, j // PAGE_LEN]`` at offset ``j % PAGE_LEN``, and
key j is valid iff ``j < lengths[b]``. What lies beyond is never read into a result, whatever it holds. The last page
of the pool is a scratch page that stands in no page table: writes that shall have no effect go there.

With ``kv_dtype="int8"`` pages are `QuantizedArray`s: beside the values an f32 scale a token and head, paged alike.

On a mesh each device has a pool of its own, with the pages of its rows, of its stage's layers and of its heads, and
numbers them from 0: the stages of a pipeline share one page table.
"""

import dataclasses
import functools
import threading
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from custom_ops import QuantizedArray
from custom_ops.pages import Pages
from kogpt_jax.config import ModelConfig
from kogpt_jax.sharding import ONE_DEVICE, Split, partition_spec

PAGE_LEN = 64  # tokens a page

_PAGES_AXES = ("pages", "heads", "kv_len", "head_dim")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "page_table", "lengths"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
@no_type_check  # JAX and `cache_specs` put other things than arrays into the same structure
class KVCache:
    """The cache of a batch: one array of pages per layer of a stage for keys and one for values."""

    k: tuple[Pages, ...]
    v: tuple[Pages, ...]
    page_table: Int[Array, "B max_pages"]
    lengths: Int[Array, " B"]

    @property
    def max_len(self) -> int:
        """Tokens a row can hold."""
        return self.page_table.shape[1] * PAGE_LEN


def cache_specs(config: ModelConfig, layers_per_stage: int) -> KVCache:
    """The partition of a cache over the mesh, in the cache's own structure."""
    of_part: Any = partition_spec(_PAGES_AXES)  # Any: they stand where a cache has arrays
    pages = (of_part if config.kv_dtype is None else QuantizedArray(of_part, of_part),) * layers_per_stage
    page_table: Any = partition_spec(("batch", None))
    lengths: Any = partition_spec(("batch",))
    return KVCache(k=pages, v=pages, page_table=page_table, lengths=lengths)


def cache_bytes_per_row(config: ModelConfig, max_len: int, split: Split = ONE_DEVICE) -> int:
    """Bytes of pages that one row of ``max_len`` tokens takes on a device, over the layers and heads it has, keys and
    values (scratch page apart)."""
    scale_bytes = 0 if config.kv_dtype is None else 4
    head_bytes = config.head_dim * config.cache_dtype.itemsize + scale_bytes  # of a token
    num_heads = split.layers_per_stage(config.num_layers) * config.num_heads // split.num_shards
    return 2 * num_heads * pages_per_row(max_len) * PAGE_LEN * head_bytes


def make_pages(config: ModelConfig, num_pages: int, num_heads: int) -> Pages:
    """Empty pages of a layer's keys, or of its values, for so many heads."""
    values = jnp.zeros((num_pages, num_heads, PAGE_LEN, config.head_dim), config.cache_dtype)
    if config.kv_dtype is None:
        return values
    return QuantizedArray(values, jnp.zeros((*values.shape[:3], 1), jnp.float32))


def pages_per_row(max_len: int) -> int:
    """Pages that hold ``max_len`` tokens."""
    return -(-max_len // PAGE_LEN)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "batch", "max_len"))
def make_kv_cache(config: ModelConfig, mesh: Mesh, batch: int, max_len: int) -> KVCache:
    """An empty cache for ``batch`` rows of up to ``max_len`` tokens, rounded up to whole pages, each row with its
    own."""
    num_data, num_stages = mesh.shape["data"], mesh.shape["pipe"]
    layers_per_stage = Split.of(mesh).layers_per_stage(config.num_layers)
    num_own = batch // num_data * pages_per_row(max_len)
    num_pages = (num_own + 1) * num_data * num_stages  # each device's rows and its scratch page

    def pages() -> tuple[Pages, ...]:
        return tuple(make_pages(config, num_pages, config.num_heads) for _ in range(layers_per_stage))

    specs = cache_specs(config, layers_per_stage)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (specs.k, specs.v))
    k, v = jax.lax.with_sharding_constraint((pages(), pages()), shardings)
    return KVCache(k, v, *make_rows(config, mesh, batch, max_len))


@functools.partial(jax.jit, static_argnames=("config", "mesh", "batch", "max_len"))
def make_rows(config: ModelConfig, mesh: Mesh, batch: int, max_len: int) -> tuple[jax.Array, jax.Array]:
    """``page_table`` and ``lengths`` of `make_kv_cache`: of rows without tokens over pages whatever they hold."""
    max_pages, num_data = pages_per_row(max_len), mesh.shape["data"]
    rows_per_shard = batch // num_data
    own_pages = jnp.arange(rows_per_shard * max_pages, dtype=jnp.int32).reshape(rows_per_shard, max_pages)
    specs: Any = cache_specs(config, 0)
    shardings = NamedSharding(mesh, specs.page_table), NamedSharding(mesh, specs.lengths)
    rows = (jnp.tile(own_pages, (num_data, 1)), jnp.zeros(batch, jnp.int32))
    return jax.lax.with_sharding_constraint(rows, shardings)


class KeptCaches:
    """Caches of batches that are done, emptied: for later batches of as many rows and the same capacity, whose first
    tokens would wait for a new one (docs/performance-notes.md, "A whole prefill").

    The newest, whatever its size, and older ones as long as all together take no more than what is set aside.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, set_aside: float):
        """``set_aside``: bytes of each device's memory."""
        self.set_aside = set_aside
        self._config, self._mesh = config, mesh
        self._caches: dict[tuple[int, int], KVCache] = {}  # the oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._caches)

    def keep(self, cache: KVCache) -> None:
        """Takes a cache that nobody uses any more."""
        batch, capacity = cache.page_table.shape[0], cache.max_len
        page_table, lengths = make_rows(self._config, self._mesh, batch, capacity)
        with self._lock:
            self._caches.pop((batch, capacity), None)
            self._caches[batch, capacity] = dataclasses.replace(cache, page_table=page_table, lengths=lengths)
            while len(self._caches) > 1 and self.num_bytes() > self.set_aside:
                del self._caches[next(iter(self._caches))]

    def take(self, batch: int, capacity: int) -> KVCache:
        """A cache of rows without tokens over pages whatever they hold: a kept one, or else a new one."""
        with self._lock:
            kept = self._caches.pop((batch, capacity), None)
            if kept is not None:
                return kept
            if self.num_bytes() > self.set_aside:
                self._caches.clear()  # before there are two
        return make_kv_cache(self._config, self._mesh, batch, capacity)

    def clear(self) -> None:
        """Gives their memory back."""
        with self._lock:
            self._caches.clear()

    def give_way(self) -> None:
        """Gives up what is set aside, for good: from now on the newest alone is kept."""
        with self._lock:
            self.set_aside = 0.0
            self._caches.clear()

    def bytes_for_others(self) -> float:
        """What a batch may take of a device's memory besides what is unused: what is kept, less what is set aside."""
        with self._lock:
            return self.num_bytes() - self.set_aside

    def num_bytes(self) -> int:
        """On each device."""
        num_data, split = self._mesh.shape["data"], Split.of(self._mesh)
        return sum(
            batch // num_data * cache_bytes_per_row(self._config, capacity, split) for batch, capacity in self._caches
        )
