"""Deterministic mode: a row has the same bits alone and in any batch."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec
from small_model import CONFIG, KERNEL_CONFIG, greedy, prompt
from test_decoding import programs

from custom_ops import all_reduce_in_order
from kogpt_jax import Completion, KoGPT, SamplingParams, decoding, kv_cache
from kogpt_jax.config import Dtype
from kogpt_jax.errors import InputError
from kogpt_jax.ops import describe, resolve_ops
from kogpt_jax.sharding import make_mesh

BATCH = 4
FILTERS: list[dict[str, Any]] = [{"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {}]
Request = tuple[list[int], SamplingParams]


def request(number: int, length: int, capacity: int) -> Request:
    """A prompt, and how to go on with it in a cache of so many tokens: odd ones are drawn, each otherwise."""
    params = greedy(min(1 + number % 9, capacity - length))
    if number % 2:
        params = dataclasses.replace(params, temperature=0.5 + number / 10, seed=number, **FILTERS[number // 2 % 4])
    return prompt(length, number), dataclasses.replace(params, ignore_eos=number % 3 != 0)


# Of three buckets of prompts and two of caches; 65 fills a page and a token of the next.
LENS = {64: (1, 9, 14, 16, 5, 16, 2, 13), 128: (66, 3, 90, 65, 96, 71, 12, 80)}
REQUESTS = [
    request(number, length, capacity)
    for capacity, lens in LENS.items()
    for number, length in enumerate(lens, 8 * (capacity == 128))
]


def generate(engine: KoGPT, numbers: Sequence[int]) -> list[Completion]:
    prompts, params = zip(*(REQUESTS[number] for number in numbers), strict=True)
    return engine.generate_ids(prompts, params)


def num_programs() -> tuple[int, ...]:
    put_row: Any = decoding.put_row
    return (*programs(), put_row._cache_size())


@pytest.fixture(scope="module")
def engine() -> KoGPT:
    dtype: Dtype = "fp32" if jax.default_backend() == "cpu" else "bf16"
    config = dataclasses.replace(KERNEL_CONFIG, dtype=dtype)
    return KoGPT.from_random(config, deterministic=True, max_batch_size=BATCH)


@pytest.mark.host
@pytest.mark.slow
def test_a_row_in_a_thousand_batches_is_the_row_alone(engine):
    """Tokens and log-probabilities, among random others in random order, greedy and drawn, in one batch or several. No
    program is compiled for a batch that the rows alone do not run."""
    alone = [generate(engine, [number])[0] for number in range(len(REQUESTS))]
    assert len({row.token_ids for row in alone}) > len(REQUESTS) // 2
    before = num_programs()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        numbers = rng.choice(len(REQUESTS), rng.integers(1, 7), replace=False).tolist()
        assert generate(engine, numbers) == [alone[number] for number in numbers]
    assert num_programs() == before


@pytest.mark.host
def test_a_text_scored_among_others_is_the_text_alone(engine):
    texts = [prompt(length, length) for length in (2, 7, 16, 15, 40, 90, 33, 12)]
    alone = [engine.score_ids([text])[0] for text in texts]
    logits = [engine.logits(text) for text in texts[:3]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers = rng.choice(len(texts), rng.integers(2, 9), replace=False)
        assert engine.score_ids([texts[number] for number in numbers]) == [alone[number] for number in numbers]
    for text, expected in zip(texts, logits, strict=False):
        np.testing.assert_array_equal(engine.logits(text), expected)


@pytest.mark.host
def test_a_stream_has_the_bits_of_a_batch(engine):
    numbers = [0, 3, 9, 5, 4, 1]
    prompts, params = zip(*(REQUESTS[number] for number in numbers), strict=True)
    token_ids: list[tuple[int, ...]] = [()] * len(numbers)
    logprobs: list[tuple[float, ...]] = [()] * len(numbers)
    for event in engine.stream_ids(prompts, params):
        token_ids[event.index] += event.token_ids
        logprobs[event.index] += event.logprobs
    expected = [generate(engine, [number])[0] for number in numbers]
    assert token_ids == [row.token_ids for row in expected]
    assert logprobs == [row.logprobs for row in expected]


@pytest.mark.slow
@pytest.mark.host
def test_it_is_the_text_of_the_other_mode(engine):
    """What is read one by one and copied is what is read together."""
    packed = KoGPT(engine.config, engine.leaves, engine.mesh, implementation="ffi")
    numbers = list(range(len(REQUESTS)))
    for row, expected in zip(generate(engine, numbers), generate(packed, numbers), strict=True):
        assert row.token_ids == expected.token_ids
        logprobs = np.array(row.logprobs, np.float32), np.array(expected.logprobs, np.float32)
        tolerances.assert_close(*logprobs, tolerances.ROW_ALONE_VS_BATCH["fp32"])


@pytest.mark.host
@pytest.mark.slow
def test_with_an_int8_cache_on_a_mesh():
    config = dataclasses.replace(
        KERNEL_CONFIG, model_dim=256, num_heads=4, ffn_dim=256, dtype="bf16", quant="w8a16", kv_dtype="int8"
    )
    engine = KoGPT.from_random(config, mesh="d2p2t2", deterministic=True, max_batch_size=8)
    chosen = [0, 4, 6, 2]  # greedy, of one capacity
    alone = {number: generate(engine, [number])[0] for number in chosen}
    rng = np.random.default_rng(0)
    for size in (2, 3, 4, 4, 3):
        numbers = rng.permutation(chosen)[:size].tolist()
        assert generate(engine, numbers) == [alone[number] for number in numbers]


@pytest.mark.host
def test_a_row_is_put_into_a_batch_in_place(engine):
    """In a pool of many pages, of which a row writes its own."""
    static, config = engine._static, engine.config
    cache, own_cache = (kv_cache.make_kv_cache(config, engine.mesh, rows, 128) for rows in (64, 1))
    hidden, own_hidden = (decoding.no_hidden(rows, **static) for rows in (64, 1))
    args = (cache, hidden, own_cache, own_hidden, jnp.array([3], jnp.int32))
    compiled = decoding.put_row.lower(*args, **static).compile()
    assert hlo.in_place_problems(compiled, (cache.k, cache.v)) == []


def test_shards_are_summed_in_their_order():
    """Of 1, 2^24, 1, -2^24 in f32 another order leaves another sum; every column has its own."""
    parts = np.array([[1, 2**24], [2**24, 1], [1, 1], [-(2**24), -(2**24)]], np.float32)
    total = jax.jit(
        jax.shard_map(
            lambda part: all_reduce_in_order(part, "tensor"),
            mesh=make_mesh(tensor=4),
            in_specs=PartitionSpec("tensor"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )(jnp.asarray(parts))
    np.testing.assert_array_equal(total, functools.reduce(np.add, parts)[None])
    assert not np.array_equal(total, functools.reduce(np.add, parts[::-1])[None])


@pytest.mark.host
def test_it_takes_the_kernels_of_decode_steps():
    for quant in ("none", "w8a16"):
        config = dataclasses.replace(KERNEL_CONFIG, quant=quant)
        for choice in ("auto", "ffi"):
            ops = resolve_ops(config, choice, platform="cpu", deterministic=True)
            assert (ops.linear, ops.linear_many_rows, ops.decode_attention) == ("ffi",) * 3
            assert describe(ops).endswith("sums over shards in order")


@pytest.mark.parametrize(
    ("config", "choice", "problem"),
    [
        (KERNEL_CONFIG, "reference", "implementation 'reference' has none"),
        pytest.param(CONFIG, "auto", "kernel of decode_attention, but head_dim must be in", marks=pytest.mark.host),
        pytest.param(
            dataclasses.replace(KERNEL_CONFIG, ffn_dim=204), "auto", "kernel of linear, but K", marks=pytest.mark.host
        ),
    ],
)
def test_what_cannot_be_the_same_is_refused(config, choice, problem):
    with pytest.raises(InputError, match=f"^deterministic .*{problem}"):
        resolve_ops(config, choice, platform="cpu", deterministic=True)
    with pytest.raises(InputError, match=f"^deterministic .*{problem}"):
        KoGPT(config, [], make_mesh(), implementation=choice, deterministic=True)


@pytest.mark.host
def test_a_drawn_text_takes_a_seed(engine):
    params = [greedy(2), SamplingParams(temperature=0.5)]
    with pytest.raises(InputError, match="^prompt 1 has temperature 0.5 and no seed: deterministic takes one$"):
        engine.generate_ids([prompt(3), prompt(4)], params)
