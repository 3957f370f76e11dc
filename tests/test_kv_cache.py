"""The paged cache: against a plain numpy model, and that nothing but a row's own tokens reaches its results."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import tolerances
from small_model import CONFIG, greedy, prompt

from custom_ops import QuantizedArray
from custom_ops.pages import append as append_tokens
from custom_ops.pages import gather as gather_pages
from custom_ops.pages import valid_tokens
from kogpt_jax import KoGPT, decoding, kv_cache, packing
from kogpt_jax import engine as engine_module
from kogpt_jax.config import ModelConfig
from kogpt_jax.kv_cache import PAGE_LEN, KeptCaches, KVCache
from kogpt_jax.sharding import Split, make_mesh

INT8_CONFIG = dataclasses.replace(CONFIG, kv_dtype="int8")
append = jax.jit(append_tokens)
gather = jax.jit(gather_pages)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of a call: how the phases use the cache, and sizes that nothing divides."""

    batch: int
    num_new: int
    num_heads: int
    head_dim: int
    max_pages: int
    spare_pages: int  # of the pool, in no page table
    dtype: str


CASES = [
    Case(batch=3, num_new=1, num_heads=2, head_dim=4, max_pages=3, spare_pages=5, dtype="float32"),
    Case(batch=2, num_new=150, num_heads=3, head_dim=8, max_pages=3, spare_pages=1, dtype="float32"),
    Case(batch=5, num_new=7, num_heads=1, head_dim=6, max_pages=2, spare_pages=9, dtype="float16"),
    Case(batch=1, num_new=64, num_heads=2, head_dim=2, max_pages=1, spare_pages=1, dtype="bfloat16"),
]


def random_pool(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A pool of random pages, and a page table that hands them out in no order; the last page is the scratch page."""
    num_pages = case.batch * case.max_pages + case.spare_pages
    pages = rng.normal(size=(num_pages, case.num_heads, PAGE_LEN, case.head_dim)).astype(jnp.dtype(case.dtype))
    ids = rng.permutation(num_pages - 1)[: case.batch * case.max_pages]
    return pages, ids.reshape(case.batch, case.max_pages).astype(np.int32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_writes_valid_tokens_where_the_table_says_and_nothing_else(case):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pages, page_table = random_pool(rng, case)
        capacity = case.max_pages * PAGE_LEN
        # Rows begin anywhere, in the middle of a page and before and behind its border among others.
        starts = rng.integers(0, capacity - case.num_new + 1, case.batch)
        starts[0] = min(PAGE_LEN - 1, capacity - case.num_new)
        positions = starts[:, None] + np.arange(case.num_new)
        is_valid = rng.random(positions.shape) < (0.0, 0.3, 0.7, 0.9, 1.0)[seed]
        # A finished row stands at the end of what its pages hold; its token is not valid.
        positions[-1, -1] += (not is_valid[-1, -1]) * capacity
        new = rng.normal(size=(*positions.shape, case.num_heads, case.head_dim)).astype(np.float32)

        expected = pages.copy()
        for b, t in zip(*np.nonzero(is_valid), strict=True):
            page = page_table[b, positions[b, t] // PAGE_LEN]
            expected[page, :, positions[b, t] % PAGE_LEN] = new[b, t].astype(pages.dtype)
        actual = append(pages, new, page_table, positions.astype(np.int32), is_valid)
        assert actual.dtype == pages.dtype
        np.testing.assert_array_equal(actual[:-1], expected[:-1], err_msg=f"seed {seed}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_reads_a_rows_pages_in_order(case):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        pages, page_table = random_pool(rng, case)
        rows = np.asarray(gather(pages, page_table))
        assert rows.dtype == pages.dtype
        for b in range(case.batch):
            for j in range(case.max_pages * PAGE_LEN):
                page = page_table[b, j // PAGE_LEN]
                np.testing.assert_array_equal(rows[b, j // PAGE_LEN, :, j % PAGE_LEN], pages[page, :, j % PAGE_LEN])


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 129, 192])
def test_valid_tokens_are_those_before_the_length(length):
    lengths = jnp.asarray([length, 192 - length], jnp.int32)
    is_valid = np.asarray(valid_tokens(lengths, 3, PAGE_LEN)).reshape(2, 192)
    np.testing.assert_array_equal(is_valid[0], np.arange(192) < length)
    np.testing.assert_array_equal(is_valid[1], np.arange(192) < 192 - length)


def test_a_new_cache_gives_each_row_pages_of_its_own():
    cache = kv_cache.make_kv_cache(CONFIG, make_mesh(), 3, 130)
    page_table = np.asarray(cache.page_table)
    num_pages = cache.k[0].shape[0]
    assert cache.max_len == 192
    assert page_table.shape == (3, 3)
    assert len(set(page_table.flat)) == 9
    assert page_table.min() >= 0
    assert page_table.max() < num_pages - 1, "the scratch page stands in the table"
    assert np.all(np.asarray(cache.lengths) == 0)
    assert len(cache.k) == len(cache.v) == CONFIG.num_layers
    for pages in (*cache.k, *cache.v):
        assert pages.shape == (num_pages, CONFIG.num_heads, PAGE_LEN, CONFIG.head_dim)
        assert pages.dtype == CONFIG.jax_dtype


def test_a_new_int8_cache_has_a_scale_a_token_and_head():
    cache = kv_cache.make_kv_cache(INT8_CONFIG, make_mesh(), 3, 130)
    for pages in (*cache.k, *cache.v):
        assert isinstance(pages, QuantizedArray)
        assert pages.qvalue.shape == (10, CONFIG.num_heads, PAGE_LEN, CONFIG.head_dim)
        assert pages.scale.shape == (10, CONFIG.num_heads, PAGE_LEN, 1)
        assert (pages.qvalue.dtype, pages.scale.dtype) == (jnp.int8, jnp.float32)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_specs_have_the_structure_of_a_cache(kv_dtype):
    config = dataclasses.replace(CONFIG, kv_dtype=kv_dtype)
    cache = kv_cache.make_kv_cache(config, make_mesh(), 2, 64)
    specs = kv_cache.cache_specs(config, CONFIG.num_layers)
    spec_leaves, structure = jax.tree.flatten(specs, is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))
    array_leaves, cache_structure = jax.tree.flatten(cache)
    assert (structure,) == (cache_structure,)
    for spec, array in zip(spec_leaves, array_leaves, strict=True):
        assert len(spec) == array.ndim


def cache_bytes(config: ModelConfig, batch: int, max_len: int) -> int:
    cache = jax.eval_shape(lambda: kv_cache.make_kv_cache(config, make_mesh(), batch, max_len))
    return sum(pages.size * pages.dtype.itemsize for pages in jax.tree.leaves((cache.k, cache.v)))


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("fp32", None), ("fp16", "fp16"), ("bf16", None), ("bf16", "int8")])
@pytest.mark.parametrize("max_len", [1, 63, 64, 65, 128, 150])
def test_bytes_per_row_are_those_of_the_arrays(dtype, kv_dtype, max_len):
    config = dataclasses.replace(CONFIG, dtype=dtype, kv_dtype=kv_dtype)
    per_row = kv_cache.cache_bytes_per_row(config, max_len)
    assert cache_bytes(config, 5, max_len) - cache_bytes(config, 2, max_len) == 3 * per_row
    head_bytes = CONFIG.head_dim + 4 if kv_dtype == "int8" else CONFIG.head_dim * config.jax_dtype.itemsize
    scratch_bytes = 2 * config.num_layers * PAGE_LEN * config.num_heads * head_bytes
    assert cache_bytes(config, 2, max_len) == 2 * per_row + scratch_bytes
    split = Split(num_stages=2, num_shards=3)
    assert kv_cache.cache_bytes_per_row(config, max_len, split) == per_row // 6
    assert kv_cache.cache_bytes_per_row(dataclasses.replace(config, num_layers=3), max_len, split) == per_row // 3
    assert kv_cache.pages_per_row(max_len) == {1: 1, 63: 1, 64: 1, 65: 2, 128: 2, 150: 3}[max_len]


@pytest.fixture(scope="module", params=[None, "int8"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KoGPT:
    engine = small_model.load(tmp_path_factory.mktemp("small"))
    if request.param is None:
        return engine
    return KoGPT(dataclasses.replace(engine.config, kv_dtype=request.param), engine.leaves, engine.mesh)


PROMPTS = [prompt(length) for length in (62, 1, 63, 64, 65, 127, 128, 129)]
# Greedy and sampled rows: what should not count must not count for either.
PARAMS = [
    dataclasses.replace(greedy(12), temperature=0.8 * (index % 2), top_p=0.9, seed=index)
    for index in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def expected(engine):
    return engine.generate_ids(PROMPTS, PARAMS)


def with_cache(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Lets the engine start from a cache that ``change`` has been at."""

    def take(caches: KeptCaches, batch: int, capacity: int) -> KVCache:
        return change(kv_cache.make_kv_cache(caches._config, caches._mesh, batch, capacity))

    monkeypatch.setattr(KeptCaches, "take", take)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -1e30])
def test_what_a_page_holds_before_a_token_is_written_reaches_no_result(engine, expected, monkeypatch, poison):
    def fill(cache: KVCache) -> KVCache:
        def poisoned(pages: jax.Array) -> jax.Array:
            return jnp.full_like(pages, -128 if pages.dtype == jnp.int8 else poison)  # of an INT8 cache the scales

        return dataclasses.replace(cache, **{side: jax.tree.map(poisoned, getattr(cache, side)) for side in ("k", "v")})

    with_cache(monkeypatch, fill)
    assert engine.generate_ids(PROMPTS, PARAMS) == expected  # log-probabilities bit for bit


def test_which_pages_a_row_has_makes_no_difference(engine, expected, monkeypatch):
    tables = []

    def shuffle(cache: KVCache) -> KVCache:
        page_table = np.random.default_rng(3).permutation(np.asarray(cache.page_table).ravel())
        tables.append(page_table)
        page_table = page_table.reshape(cache.page_table.shape)
        return dataclasses.replace(cache, page_table=jax.device_put(page_table, cache.page_table.sharding))

    with_cache(monkeypatch, shuffle)
    assert engine.generate_ids(PROMPTS, PARAMS) == expected
    assert np.any(np.diff(tables[0]) != 1)


@pytest.fixture
def made(monkeypatch):
    """The rows and the capacity of each cache that is made."""
    make, made = kv_cache.make_kv_cache, []

    def watched(config, mesh, batch, capacity):
        made.append((batch, capacity))
        return make(config, mesh, batch, capacity)

    monkeypatch.setattr(kv_cache, "make_kv_cache", watched)
    return made


def test_a_batch_takes_the_pages_of_one_before_if_they_fit(engine, expected, monkeypatch, made):
    engine._kept_caches.clear()
    engine.generate_ids(PROMPTS, PARAMS)
    phases: Any = (decoding.prefill, decoding.decode_loop)
    programs = [phase._cache_size() for phase in phases]
    (kept,) = engine._kept_caches._caches.values()
    assert not np.any(np.asarray(kept.lengths))  # emptied already
    pages = jax.tree.leaves(kept.k)[0].unsafe_buffer_pointer()
    made.clear()
    assert engine.generate_ids(PROMPTS, PARAMS) == expected
    assert made == []
    (kept,) = engine._kept_caches._caches.values()
    assert jax.tree.leaves(kept.k)[0].unsafe_buffer_pointer() == pages
    assert [phase._cache_size() for phase in phases] == programs
    engine.generate_ids(PROMPTS[:1], PARAMS[:1])
    assert len(made) == 1  # of another size
    for _ in range(2):  # both are kept
        assert engine.generate_ids(PROMPTS, PARAMS) == expected
        engine.generate_ids(PROMPTS[:1], PARAMS[:1])
    assert len(made) == 1
    stream = engine.stream_ids(PROMPTS, PARAMS)
    next(stream)
    with monkeypatch.context() as patch:
        for module in (kv_cache, decoding):
            for name, function in vars(module).items():
                if hasattr(function, "lower"):  # jitted
                    patch.setattr(module, name, None)
        stream.close()  # in the middle; where it is the interpreter that ends, no program may start
    assert engine.generate_ids(PROMPTS, PARAMS) == expected
    engine.score_ids(PROMPTS[-1:])
    assert not engine._kept_caches  # their memory is for the score


@pytest.mark.parametrize("phase", ["start_decode", "decode_loop"])
def test_after_an_error_no_cache_is_kept(engine, expected, monkeypatch, phase):
    def fail(*args, **static):
        raise RuntimeError("the device is gone")

    engine.generate_ids(PROMPTS, PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, phase, fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            engine.generate_ids(PROMPTS, PARAMS)
    assert not engine._kept_caches
    assert engine.generate_ids(PROMPTS, PARAMS) == expected


def test_old_caches_are_kept_as_long_as_all_are_small(engine, made):
    def num_bytes(*sizes: tuple[int, int]) -> int:
        return sum(batch * kv_cache.cache_bytes_per_row(engine.config, capacity) for batch, capacity in sizes)

    small, other, large = (1, 64), (1, 128), (4, 128)
    caches = KeptCaches(engine.config, engine.mesh, num_bytes(small, other))

    def use(size: tuple[int, int]) -> tuple[list[tuple[int, int]], bool]:
        """What is kept then, and whether a cache had to be made."""
        made.clear()
        cache = caches.take(*size)
        assert (cache.page_table.shape[0], cache.max_len) == size
        caches.keep(cache)
        return list(caches._caches), bool(made)

    assert use(small) == ([small], True)
    assert use(other) == ([small, other], True)
    assert use(small) == ([other, small], False)
    assert caches.bytes_for_others() == 0  # all that is set aside is taken
    assert use(large) == ([large], True)  # more than all may take, and the newest
    assert caches.bytes_for_others() == num_bytes(large) - num_bytes(small, other)
    assert use(large) == ([large], False)
    caches.take(*small)
    assert not caches  # before there were two
    assert caches.bytes_for_others() == -num_bytes(small, other)
    use(small)
    caches.give_way()
    assert not caches
    assert caches.bytes_for_others() == 0
    assert use(small) == ([small], True)  # the newest alone
    assert use(other) == ([other], True)
    caches.clear()
    assert not caches


def test_small_kept_caches_give_way_to_a_batch_that_needs_their_memory(engine, monkeypatch):
    """For good, and only where that is enough. Texts to score take it as well."""
    needed = engine._batch_bytes([(len(prompt), 12) for prompt in PROMPTS])
    caches = KeptCaches(engine.config, engine.mesh, 1000.0)
    monkeypatch.setattr(engine, "_kept_caches", caches)
    unused = needed - 1001
    monkeypatch.setattr(engine_module, "_unused_bytes", lambda devices: unused + 1000 - caches.num_bytes())
    engine.generate_ids(PROMPTS, PARAMS)  # in halves
    assert max(batch for batch, _ in caches._caches) < len(PROMPTS)
    assert caches.set_aside == 1000
    unused += 1
    engine.generate_ids(PROMPTS, PARAMS)  # as one batch
    assert [batch for batch, _ in caches._caches] == [len(PROMPTS)]
    assert caches.set_aside == 0
    lens = [len(prompt) for prompt in PROMPTS]
    caches.set_aside = 1000.0
    unused = engine._score_bytes(sum(lens), len(lens)) - 1000
    assert list(engine._scored_together(lens)) == [sorted(range(len(lens)), key=lens.__getitem__, reverse=True)]


def test_only_a_rows_own_tokens_are_written(engine, monkeypatch):
    """Not those behind a prompt, not those of steps after a row has finished, and a padding row writes one token."""
    marker = 7.0
    states: list[decoding.DecodeState] = []

    def mark(cache: KVCache) -> KVCache:
        marked = jax.tree.map(lambda pages: jnp.full_like(pages, marker), cache.k)
        return dataclasses.replace(cache, k=marked, v=jax.tree.map(jnp.copy, marked))

    def watched(*args, **static):
        state, emitted = decode_loop(*args, **static)
        states.append(state)
        return state, emitted

    decode_loop = decoding.decode_loop
    monkeypatch.setattr(decoding, "decode_loop", watched)
    with_cache(monkeypatch, mark)
    prompts = sorted((row for row in PROMPTS if len(row) != 62), key=len, reverse=True)
    new_lens = (12, 1, 3, 8, 9, 10, 2)
    engine.generate_ids(prompts, [greedy(new_len) for new_len in new_lens])
    assert len(states) == 2  # 16 steps for at most 11

    cache = states[-1].cache
    num_cached = [len(row) + new_len - 1 for row, new_len in zip(prompts, new_lens, strict=True)] + [1]
    np.testing.assert_array_equal(cache.lengths, num_cached)
    is_written = np.zeros((cache.k[0].shape[0], PAGE_LEN), bool)
    for page_ids, length in zip(np.asarray(cache.page_table), num_cached, strict=True):
        for j in range(length):
            is_written[page_ids[j // PAGE_LEN], j % PAGE_LEN] = True
    for pages in jax.tree.leaves((cache.k, cache.v)):
        holds_marker = np.all(np.asarray(pages) == marker, axis=(1, 3))
        np.testing.assert_array_equal(~holds_marker[:-1], is_written[:-1])


def test_tokens_behind_the_prompts_do_not_matter(engine, expected, monkeypatch):
    def pack_with_noise(rows, **options):
        chunks = []
        for packed in packing.pack_prompts(rows, **options):
            is_behind = np.arange(packed.tokens.shape[1]) >= packed.num_new.sum()
            assert is_behind.any()
            noise = np.random.default_rng(0).integers(0, CONFIG.vocab_size, packed.tokens.shape, np.int32)
            tokens: Any = np.where(is_behind, noise, packed.tokens)
            chunks.append(dataclasses.replace(packed, tokens=tokens))
        return chunks

    monkeypatch.setattr("kogpt_jax.engine.pack_prompts", pack_with_noise)
    assert engine.generate_ids(PROMPTS, PARAMS) == expected


def test_decoding_over_pages_is_the_forward_over_the_whole_text(engine, expected):
    """Rows whose prompts end just before, at and behind a page's border, and cross it while decoding."""
    texts = [(*row, *completion.token_ids) for row, completion in zip(PROMPTS, expected, strict=True)]
    tolerance = tolerances.CACHED_VS_WHOLE["fp32"]
    if engine.config.kv_dtype == "int8":
        tolerance = tolerances.CACHED_VS_WHOLE_INT8
    for row, score, completion in zip(PROMPTS, engine.score_ids(texts), expected, strict=True):
        assert len(completion.token_ids) == 12
        tolerances.assert_close(completion.logprobs, score.logprobs[len(row) :], tolerance, f"prompt of {len(row)}")
