"""The jitted phases: the cache in place, early exit, one look of the host a chunk, and no program compiled twice."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import hlo
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import tolerances
from jax.sharding import PartitionSpec
from small_model import CONFIG, KERNEL_CONFIG, greedy, prompt

from custom_ops import NO_TOKEN, make_semaphores
from kogpt_jax import KoGPT, SamplingParams, decoding, kv_cache
from kogpt_jax.config import Dtype, OpsConfig, Quant
from kogpt_jax.decoding import DecodeState
from kogpt_jax.engine import STEPS_PER_CHUNK
from kogpt_jax.kv_cache import KVCache
from kogpt_jax.model import model_def
from kogpt_jax.packing import pack, stack
from kogpt_jax.sampling import RowSampling
from kogpt_jax.sharding import Split

_COMPILED: list[str] = []
_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


def _note_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _BACKEND_COMPILE:
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> KoGPT:
    return small_model.load(tmp_path_factory.mktemp("small"))


# -- In place ---------------------------------------------------------------------------------------------------------

BATCH = 4


@dataclasses.dataclass(frozen=True)
class Call:
    """A phase, as it is and without donation, with arguments for it."""

    donating: Any
    keeping: Any
    args: tuple[Any, ...]
    static: dict[str, Any]
    cache: KVCache


def make_call(engine: KoGPT, phase: str) -> Call:
    """Arguments over a pool many times as large as what the rows use, and larger than the kernels' scratch, so that one
    copy of it shows."""
    times = 8 if engine.config.kv_dtype is None and engine.config.dtype == "fp32" else 32
    cache = kv_cache.make_kv_cache(engine.config, engine.mesh, times * BATCH, engine.config.max_len)
    cache = dataclasses.replace(cache, page_table=cache.page_table[:BATCH], lengths=cache.lengths[:BATCH])
    static: dict[str, Any] = dict(engine._static)
    args: tuple[Any, ...]
    if phase == "prefill":
        chunks = stack(pack([[1] * 8] * BATCH))
        args = (cache, jnp.zeros((BATCH, engine.config.model_dim)), chunks)
    else:
        rows = RowSampling.from_params([SamplingParams(seed=0)] * BATCH)
        ones, ignore_eos = np.ones(BATCH, np.int32), np.zeros(BATCH, bool)
        args = (
            DecodeState(
                cache, jnp.asarray(ones), jnp.asarray(ones), jnp.asarray(ignore_eos), rows, make_semaphores(), None
            ),
        )
        static["num_steps"] = STEPS_PER_CHUNK
    function: Any = getattr(decoding, phase)
    keeping = jax.jit(function.__wrapped__, static_argnames=tuple(static))
    return Call(function, keeping, (engine.leaves, *args), static, cache)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "w8a16", "w8a8"])
def test_of_the_last_layer_only_the_last_tokens_are_read(quant: Quant):
    """The same residual stream behind each row's last token, and the same cache, as with the last layer as a whole:
    chunks in which a row begins, goes on, ends, and has no token."""
    config = dataclasses.replace(CONFIG, quant=quant, num_layers=3)
    engine = KoGPT.from_random(config)
    definition = engine._definition
    chunks = pack([prompt(7), prompt(20, 1), prompt(1, 2), prompt(9, 3)], chunk_tokens=16)
    assert [list(packed.num_new) for packed in chunks] == [[7, 9, 0, 0], [0, 11, 1, 4], [0, 0, 0, 5]]
    cache = both = kv_cache.make_kv_cache(config, engine.mesh, 4, 64)

    @functools.partial(jax.jit, static_argnames="last_only")
    def read(leaves, packed, cache, last_only):
        def local(leaves, packed, cache):
            model = definition.merge(leaves)
            return model.prefill(model.embed(packed.tokens), packed, cache, last_only=last_only)

        everywhere = PartitionSpec()
        run = jax.shard_map(local, mesh=engine.mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        return run(leaves, packed, cache)

    for packed in chunks:
        whole, cache = read(list(engine.leaves), packed, cache, last_only=False)
        last, both = read(list(engine.leaves), packed, both, last_only=True)
        assert last.shape == (4, config.model_dim)
        expected = np.asarray(whole)[np.maximum(packed.begins + packed.num_new - 1, 0)]
        is_read = np.asarray(packed.num_new) > 0
        rule = tolerances.LAST_LAYER_W8A8 if quant == "w8a8" else tolerances.MODULE["fp32"]
        tolerances.assert_close(last[is_read], expected[is_read], rule, quant)
        np.testing.assert_array_equal(both.lengths, cache.lengths)
        for got, want in zip((*both.k, *both.v), (*cache.k, *cache.v), strict=True):
            # But for the scratch page, which has what became of tokens of no row.
            tolerances.assert_close(got[:-1], want[:-1], tolerances.MODULE["fp32"], f"cache, {quant}")


@pytest.fixture(scope="module", params=["prefill", "decode_loop"])
def call(request: pytest.FixtureRequest, engine: KoGPT) -> Call:
    """By XLA: what the kernels have for themselves is larger than this cache."""
    return make_call(KoGPT(engine.config, engine.leaves, engine.mesh, implementation="reference"), request.param)


@pytest.mark.parametrize("phase", ["prefill", "decode_loop"])
def test_an_int8_cache_is_updated_in_place(phase):
    config = dataclasses.replace(CONFIG, kv_dtype="int8")
    call = make_call(KoGPT.from_random(config, implementation="reference"), phase)
    compiled = call.donating.lower(*call.args, **call.static).compile()
    pages = (call.cache.k, call.cache.v)
    assert len(jax.tree.leaves(pages)) == 4 * CONFIG.num_layers  # values and scales
    assert hlo.in_place_problems(compiled, pages) == []
    compiled = call.keeping.lower(*call.args, **call.static).compile()
    copied = [problem.split()[2] for problem in hlo.in_place_problems(compiled, pages) if "copy makes" in problem]
    assert sum(result.startswith("s8[385,3,64,16]") for result in copied) == 2 * CONFIG.num_layers
    assert sum(result.startswith("f32[385,3,64,1]") for result in copied) == 2 * CONFIG.num_layers


def test_the_cache_is_updated_in_place(call):
    compiled = call.donating.lower(*call.args, **call.static).compile()
    assert hlo.in_place_problems(compiled, (call.cache.k, call.cache.v)) == []


@pytest.mark.host
@pytest.mark.parametrize(("quant", "kv_dtype"), [("none", None), ("w8a16", None), ("none", "int8")])
def test_the_kernels_update_the_cache_in_place(quant, kv_dtype):
    """Likewise the semaphores: the loop copies neither. All of a step's kernels are one call."""
    dtype: Dtype = "fp32" if jax.default_backend() == "cpu" else "bf16"
    config = dataclasses.replace(KERNEL_CONFIG, dtype=dtype, quant=quant, kv_dtype=kv_dtype)
    call = make_call(KoGPT.from_random(config, implementation="ffi"), "decode_loop")
    compiled = call.donating.lower(*call.args, **call.static).compile()
    assert hlo.in_place_problems(compiled, (call.cache.k, call.cache.v)) == []
    module = hlo.Module.parse(compiled.as_text())
    copied = [instruction.result for instruction in module.running() if instruction.opcode.startswith("copy")]
    assert not any(result.startswith("s32[65536]") for result in copied)
    kernels = [instruction.rest for instruction in module.running() if instruction.opcode == "custom-call"]
    targets = [target for rest in kernels for target in re.findall(r'"(kogpt_\w+)"', rest)]
    assert targets == ["kogpt_decode_steps"]


def test_without_donation_it_is_not(call):
    """The check above fails where ``donate_argnames`` is removed: nothing is aliased, and each array is copied."""
    compiled = call.keeping.lower(*call.args, **call.static).compile()
    problems = hlo.in_place_problems(compiled, (call.cache.k, call.cache.v))
    num_arrays = 2 * CONFIG.num_layers
    assert f"0 bytes are aliased, the cache has {sum(x.nbytes for x in (*call.cache.k, *call.cache.v))}" in problems
    assert f"0 of {num_arrays} arrays of pages are aliased to an output" in problems
    assert sum(problem.startswith("copy makes f32[97,3,64,16]") for problem in problems) == num_arrays


PAGES_SHAPE = (97, 3, 64, 16)


@functools.partial(jax.jit, donate_argnums=0)
def in_place_loop(pages, index):
    def step(i, pages):
        return pages.at[index + i].set(1.0, mode="promise_in_bounds")

    return jax.lax.fori_loop(0, 8, step, pages)


@functools.partial(jax.jit, donate_argnums=0)
def copying_loop(pages, index):
    def step(i, carry):
        pages, total = carry
        new = pages.at[index + i].set(1.0, mode="promise_in_bounds")
        return new, total + jnp.sum(new * pages)  # both are alive: one must be a copy

    return jax.lax.fori_loop(0, 8, step, (pages, jnp.float32(0)))


@functools.partial(jax.jit, donate_argnums=0)
def rewriting_loop(pages, index):
    def step(i, pages):
        is_written = jnp.arange(pages.shape[0]) == index + i
        return jnp.where(is_written[:, None, None, None], 1.0, pages)

    return jax.lax.fori_loop(0, 8, step, pages)


@pytest.mark.parametrize(
    ("loop", "opcodes"), [(in_place_loop, set()), (copying_loop, {"copy"}), (rewriting_loop, {"select"})]
)
def test_a_copy_inside_a_loop_is_found(loop, opcodes):
    pages = jnp.zeros(PAGES_SHAPE)
    compiled = loop.lower(pages, jnp.int32(3)).compile()
    problems = hlo.in_place_problems(compiled, [pages])
    assert {problem.split()[0] for problem in problems if " makes " in problem} == opcodes


def test_donated_buffers_are_gone_after_a_call(engine):
    """Whoever holds on to a cache that a phase was given cannot read it by mistake."""
    call = make_call(engine, "prefill")
    cache, last_hidden = call.donating(*call.args, **call.static)
    assert all(pages.is_deleted() for pages in jax.tree.leaves((call.cache.k, call.cache.v)))
    addresses = [pages.unsafe_buffer_pointer() for pages in jax.tree.leaves((cache.k, cache.v))]
    rows, ones = RowSampling.from_params([SamplingParams(seed=0)] * BATCH), jnp.ones(BATCH, jnp.int32)
    state, emitted = decoding.start_decode(
        engine.leaves, cache, last_hidden, ones, jnp.zeros(BATCH, bool), rows, **call.static
    )
    assert all(pages.is_deleted() for pages in jax.tree.leaves((cache.k, cache.v)))
    next_state, next_emitted = decoding.decode_loop(engine.leaves, state, num_steps=STEPS_PER_CHUNK, **call.static)
    for array in jax.tree.leaves((emitted, next_emitted)):
        assert array.sharding.memory_kind == "pinned_host"  # the phase itself copies them
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    next_pages = jax.tree.leaves((next_state.cache.k, next_state.cache.v))
    assert [pages.unsafe_buffer_pointer() for pages in next_pages] == addresses
    assert not emitted.tokens.is_deleted()
    assert not any(leaf.is_deleted() for leaf in engine.leaves)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(jax.tree.leaves(state.cache)[0])


@pytest.mark.host
@pytest.mark.parametrize("mesh", ["d1p1t1", "d2p1t1"])
def test_greedy_steps_as_one_call_are_those_of_the_loop(mesh):
    """Rows that end by a token, by their number or not at all, and one of padding; two chunks."""
    engine = KoGPT.from_random(KERNEL_CONFIG, implementation="ffi", mesh=mesh, seed=2)
    params = [greedy(20), SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=12), greedy(4)]
    prompts = [prompt(length, length) for length in (9, 1, 30, 66)]
    texts = [completion.token_ids for completion in engine.generate_ids(prompts, greedy(20))]
    config = dataclasses.replace(KERNEL_CONFIG, eos_token_ids=(texts[1][3], texts[2][9]))
    engine = KoGPT.from_random(config, implementation="ffi", mesh=mesh, seed=2)
    start, _ = engine._prefill(engine._slots(engine._requests(prompts, params)))
    loop: Any = decoding.decode_loop

    def decode(state: DecodeState, ops: OpsConfig) -> tuple[Any, ...]:
        static = engine._static | {"definition": model_def(config, Split.of(engine.mesh), ops), "num_steps": 8}
        phase = jax.jit(loop.__wrapped__, static_argnames=tuple(static))
        is_one_call = "@kogpt_decode_steps" in phase.lower(engine.leaves, state, **static).as_text()
        assert is_one_call == (ops.decode_steps == "ffi")
        emitted = []
        for _ in range(2):
            state, new = phase(engine.leaves, state, **static)
            emitted.append(new)
        return state, *(np.concatenate([getattr(new, name) for new in emitted], 1) for name in ("tokens", "logprobs"))

    assert engine.ops.decode_steps == "ffi"
    state, tokens, logprobs = decode(start, engine.ops)
    expected, expected_tokens, expected_logprobs = decode(
        start, dataclasses.replace(engine.ops, decode_steps="reference")
    )
    assert 0 < (tokens == NO_TOKEN).sum() < tokens.size
    np.testing.assert_array_equal(tokens, expected_tokens)
    tolerances.assert_close(logprobs, expected_logprobs, tolerances.STEP_OF_KERNELS["fp32"])
    for name in ("tokens", "num_remaining"):
        np.testing.assert_array_equal(getattr(state, name), getattr(expected, name))
    np.testing.assert_array_equal(state.cache.lengths, expected.cache.lengths)
    pages = [jax.tree.leaves((cache.k, cache.v)) for cache in (state.cache, expected.cache)]
    for a, b in zip(*pages, strict=True):
        tolerances.assert_close(a, b, tolerances.STEP_OF_KERNELS["fp32"])


# -- Chunks and early exit --------------------------------------------------------------------------------------------


class Spy:
    """An array that notes when the host reads it."""

    def __init__(self, array: jax.Array, name: str, log: list[str]):
        self._array, self._name, self._log = array, name, log

    def __array__(self, *args, **kwargs):
        self._log.append(self._name)
        return np.asarray(self._array, *args, **kwargs)

    is_fully_addressable = True

    def copy_to_host_async(self):
        self._array.copy_to_host_async()

    def __bool__(self):
        self._log.append(self._name)
        return bool(self._array)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the phases and the host's reads of what they emitted, in order."""
    log: list[str] = []

    def watched(name: str, phase: Callable) -> Callable:
        @functools.wraps(phase)
        def run(*args, **static):
            log.append(name)
            state, emitted = phase(*args, **static)
            names = [field.name for field in dataclasses.fields(emitted)]
            spies: dict[str, Any] = {name: Spy(getattr(emitted, name), name, log) for name in names}
            return state, decoding.Emitted(**spies)

        return run

    for name in ("start_decode", "decode_loop"):
        monkeypatch.setattr(decoding, name, watched(name, getattr(decoding, name)))
    return log


def until_eos(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    ends = [index for index, token_id in enumerate(token_ids) if token_id in CONFIG.eos_token_ids]
    return token_ids[: ends[0] + 1] if ends else token_ids


PROMPTS = [prompt(length) for length in (1, 2, 3, 5, 8, 13, 16)]


@pytest.fixture(scope="module")
def unending(engine):
    """Greedy texts that went on over end-of-text tokens."""
    return [completion.token_ids for completion in engine.generate_ids(PROMPTS, greedy(48))]


def test_chunks_end_when_all_rows_have_met_eos(engine, unending, log):
    early = [index for index, token_ids in enumerate(unending) if len(until_eos(token_ids)) <= 1 + STEPS_PER_CHUNK]
    assert len(early) >= 2, "no early end to see"
    completions = engine.generate_ids([PROMPTS[index] for index in early], SamplingParams(max_new_tokens=100))
    assert [completion.token_ids for completion in completions] == [until_eos(unending[index]) for index in early]
    assert {completion.finish_reason for completion in completions} == {"stop"}
    assert log.count("start_decode") == 1
    assert log.count("decode_loop") == 1


def test_prefill_alone_is_enough_where_it_ends_all(engine, unending, log):
    (at_once,) = [index for index, token_ids in enumerate(unending) if len(until_eos(token_ids)) == 1]
    (completion,) = engine.generate_ids([PROMPTS[at_once]])
    assert completion.token_ids == unending[at_once][:1]
    assert completion.finish_reason == "stop"
    assert log.count("decode_loop") == 0


def test_the_last_row_decides_how_many_chunks_run(engine, unending, log):
    texts = [until_eos(token_ids) for token_ids in unending]
    params = SamplingParams(max_new_tokens=48)
    completions = engine.generate_ids(PROMPTS, params)
    assert [completion.token_ids for completion in completions] == texts
    reasons = [completion.finish_reason for completion in completions]
    assert reasons == ["stop" if text[-1] in CONFIG.eos_token_ids else "length" for text in texts]
    assert set(reasons) == {"stop", "length"}
    num_chunks = -(-(max(map(len, texts)) - 1) // STEPS_PER_CHUNK)
    assert log.count("decode_loop") == num_chunks == 6


@pytest.mark.parametrize(("max_new_tokens", "num_chunks"), [(1, 0), (2, 1), (9, 1), (10, 2)])
def test_no_chunk_more_than_the_tokens_asked_for(engine, unending, log, max_new_tokens, num_chunks):
    completions = engine.generate_ids(PROMPTS, greedy(max_new_tokens))
    assert [completion.token_ids for completion in completions] == [ids[:max_new_tokens] for ids in unending]
    assert log.count("decode_loop") == num_chunks


def test_the_host_looks_once_at_each_chunk(engine, log):
    engine.generate_ids(PROMPTS, greedy(24))
    look = ["tokens", "logprobs", "all_done"]
    assert log == ["start_decode", *look, *(["decode_loop", *look] * 3)]


def test_on_a_gpu_the_next_chunk_is_under_way_before_the_host_looks(engine, unending, log, monkeypatch):
    monkeypatch.setattr(engine, "_chunks_in_flight", 2)
    completions = engine.generate_ids(PROMPTS, greedy(24))
    assert [completion.token_ids for completion in completions] == [token_ids[:24] for token_ids in unending]
    look = ["tokens", "logprobs", "all_done"]
    assert log == ["start_decode", "decode_loop", *look, "decode_loop", *look, "decode_loop", *look, *look]

    log.clear()
    early = [index for index, token_ids in enumerate(unending) if len(until_eos(token_ids)) <= 1 + STEPS_PER_CHUNK]
    completions = engine.generate_ids([PROMPTS[index] for index in early], SamplingParams(max_new_tokens=48))
    assert [completion.token_ids for completion in completions] == [until_eos(unending[index]) for index in early]
    assert log.count("decode_loop") == 2  # one more than needed, and no other


def test_finished_and_padding_rows_emit_nothing(engine):
    """What the host sees of them is ``NO_TOKEN`` and 0, and their state stays."""
    requests = engine._requests(PROMPTS, [greedy(length) for length in (1, 2, 3, 9, 10, 17, 17)])
    emitted = list(engine._dispatch([*requests, None]))
    tokens = np.concatenate([np.asarray(chunk.tokens) for chunk in emitted], axis=1)
    logprobs = np.concatenate([np.asarray(chunk.logprobs) for chunk in emitted], axis=1)
    assert [bool(chunk.all_done) for chunk in emitted] == [False, False, True]
    num_emitted = np.array([1, 2, 3, 9, 10, 17, 17, 0])  # 7 rows and one of padding
    is_emitted = np.arange(tokens.shape[1]) < num_emitted[:, None]
    np.testing.assert_array_equal(tokens != NO_TOKEN, is_emitted)
    np.testing.assert_array_equal(logprobs != 0, is_emitted)


# -- Compilation ------------------------------------------------------------------------------------------------------


def programs() -> tuple[int, ...]:
    phases: tuple[Any, ...] = (
        kv_cache.make_kv_cache,
        decoding.prefill,
        decoding.start_decode,
        decoding.decode_loop,
        decoding.score,
        decoding.all_logits,
    )
    return tuple(phase._cache_size() for phase in phases)


@pytest.mark.slow
def test_nothing_compiles_anew_within_a_bucket(engine):
    """Lengths, parameters, seeds and numbers of rows vary: 5 to 8 prompts of up to 16 tokens, 65 to 96 in all, with up
    to 64 tokens a row. A batch of greedy rows and one of others are two programs."""
    engine.generate_ids([prompt(12)] * 8, greedy(49))
    engine.generate_ids([prompt(12)] * 8, dataclasses.replace(greedy(49), temperature=1.0))
    engine.score_ids([prompt(12)] * 8)
    engine.logits(prompt(16))
    before, num_compiled = programs(), len(_COMPILED)
    rng = np.random.default_rng(0)
    for num_rows in (5, 6, 7, 8):
        lens = 75 // num_rows + rng.integers(0, 2, num_rows)  # 66 to 88 tokens in all
        prompts = [prompt(int(length), salt) for salt, length in enumerate(lens)]
        params = [
            SamplingParams(
                max_new_tokens=int(rng.integers(1, 50)),
                temperature=float(rng.choice([0.0, 0.7, 1.3])),
                top_k=int(rng.integers(0, 300)),
                top_p=float(rng.uniform(0.1, 1)),
                min_p=float(rng.uniform(0, 0.2)),
                seed=[None, 0, 2**32 - 1][salt % 3],
                ignore_eos=bool(salt % 2),
            )
            for salt in range(num_rows)
        ]
        engine.generate_ids(prompts, params)
        engine.generate_ids(prompts, greedy(49))
        list(engine.stream_ids(prompts, params[0]))
        engine.score_ids([row if len(row) > 1 else row * 2 for row in prompts])
        engine.logits(prompts[0])
    assert programs() == before
    assert len(_COMPILED) == num_compiled


def test_another_engine_over_the_same_config_compiles_nothing(engine, tmp_path):
    sampled = SamplingParams(max_new_tokens=20, temperature=0.5)
    engine.generate_ids([prompt(16)] * 8, greedy(49))
    engine.generate_ids(PROMPTS, sampled)
    num_compiled = len(_COMPILED)
    other = small_model.load(tmp_path)
    num_loading = len(_COMPILED)
    other.generate_ids(PROMPTS, sampled)
    assert len(_COMPILED) == num_loading
    assert num_loading - num_compiled <= 20  # placing the weights


def test_another_bucket_is_another_program(engine):
    """So the counts of the two tests above can change."""
    before, num_compiled = programs(), len(_COMPILED)
    engine.score_ids([prompt(33)] * 5)
    assert programs() == (*before[:4], before[4] + 1, before[5])
    assert len(_COMPILED) == num_compiled + 1
