"""Rows of tokens in packed chunks."""

import numpy as np
import pytest
import small_model
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG, greedy, prompt

from kogpt_jax import KoGPT, decoding, packing
from kogpt_jax.packing import Packed, bucket, pack


def tokens_of(packed: Packed, slot: int, num_shards: int) -> list[int]:
    """What a chunk has of a row."""
    tokens = np.asarray(packed.tokens).reshape(num_shards, -1)
    shard = slot // (len(packed.begins) // num_shards)
    begin = packed.begins[slot]
    return tokens[shard, begin : begin + packed.num_new[slot]].tolist()


def test_a_worked_example():
    first, second = pack([[1, 1, 1], [2, 2], [3]], chunk_tokens=4)
    assert np.asarray(first.tokens)[:4].tolist() == [1, 1, 1, 2]
    assert np.asarray(first.begins)[:2].tolist() == [0, 3]
    assert np.asarray(first.num_new).tolist() == [3, 1, 0]
    assert np.asarray(second.tokens)[:2].tolist() == [2, 3]
    assert np.asarray(second.begins)[1:].tolist() == [0, 1]
    assert np.asarray(second.num_new).tolist() == [0, 1, 1]


@settings(max_examples=40)
@given(
    num_shards=st.sampled_from([1, 2, 4]),
    lens=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    chunk_tokens=st.sampled_from([1, 7, 16, 64, 1000]),
)
def test_the_chunks_hold_each_row_in_order(num_shards, lens, chunk_tokens):
    lens = (lens * num_shards)[: len(lens) // num_shards * num_shards] or lens[:1] * num_shards
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, length).tolist() for length in lens]
    chunks = pack(rows, num_shards=num_shards, chunk_tokens=chunk_tokens)
    read = np.zeros(len(rows), int)
    for packed in chunks:
        size = len(packed.tokens) // num_shards
        assert size == bucket(size)
        in_shard = np.asarray(packed.num_new).reshape(num_shards, -1).sum(axis=1)
        assert in_shard.max() <= min(chunk_tokens, size)
        read += packed.num_new
        assert packed.max_len == bucket(int(max(read[packed.num_new > 0])))
    for slot, row in enumerate(rows):
        assert sum((tokens_of(packed, slot, num_shards) for packed in chunks), []) == row
    assert len(chunks) == -(-np.reshape(lens, (num_shards, -1)).sum(axis=1).max() // chunk_tokens)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 16), (16, 16), (17, 32), (33, 48), (49, 64), (65, 96), (97, 128), (8192, 8192)]
)
def test_buckets_grow_by_half_at_most(size, expected):
    assert bucket(size) == expected


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> KoGPT:
    return small_model.load(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("chunk_tokens", [16, 100])
def test_prompts_read_in_chunks_are_those_read_at_once(engine, monkeypatch, chunk_tokens):
    """Chunks end within rows, at pages' borders and elsewhere."""
    prompts = [prompt(length, length) for length in (1, 130, 64, 17)]
    expected = engine.generate_ids(prompts, greedy(6))
    num_calls = 0
    prefill = decoding.prefill

    def counting(*args, **static):
        nonlocal num_calls
        num_calls += 1
        return prefill(*args, **static)

    monkeypatch.setattr(decoding, "prefill", counting)
    monkeypatch.setattr(packing, "CHUNK_TOKENS", chunk_tokens)
    for completion, whole in zip(engine.generate_ids(prompts, greedy(6)), expected, strict=True):
        assert completion.token_ids == whole.token_ids
        tolerances.assert_close(
            completion.logprobs, whole.logprobs, tolerances.CACHED_VS_WHOLE["fp32"], f"{completion.usage}"
        )
    assert num_calls == -(-212 // chunk_tokens)


def test_texts_are_scored_in_groups_of_as_many_tokens(engine, monkeypatch):
    texts = [prompt(length, length) for length in (2, 90, 150, 33, 60, 40)]
    expected = engine.score_ids(texts)
    groups = []
    score = decoding.score

    def watched(leaves, chunks, **static):
        groups.append(sorted(chunks.num_new[0].tolist()))
        return score(leaves, chunks, **static)

    monkeypatch.setattr(decoding, "score", watched)
    monkeypatch.setattr("kogpt_jax.engine.CHUNK_TOKENS", 100)
    for got, wanted in zip(engine.score_ids(texts), expected, strict=True):
        assert got.token_ids == wanted.token_ids
        tolerances.assert_close(got.logprobs[1:], wanted.logprobs[1:], tolerances.CACHED_VS_WHOLE["fp32"], "score")
    assert groups == [[150], [90], [40, 60], [2, 33]]
    assert CONFIG.max_len == 150  # one text of the whole context is more than a group
