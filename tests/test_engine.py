"""`KoGPT` as a caller meets it: rows that do not depend on each other, where texts end, streams, scores, refusals."""

import concurrent.futures
import dataclasses
import itertools
import pathlib
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import tolerances
from small_model import CONFIG, EOS_NAME, greedy, log_softmax, prompt, unchecked_types

from kogpt_jax import KOGPT_6B, Completion, KoGPT, SamplingParams, Score, Usage, decoding, kv_cache
from kogpt_jax import engine as engine_module
from kogpt_jax.engine import perplexity, resolve_eos
from kogpt_jax.errors import InputError
from kogpt_jax.model import model_def
from kogpt_jax.packing import pack, stack
from kogpt_jax.tokenizer import load_tokenizer

LENGTHS = (1, 2, 3, 5, 8, 13, 16)
PROMPTS = [prompt(length) for length in LENGTHS]
SAMPLED = [
    SamplingParams(max_new_tokens=24, temperature=0.9, seed=1, ignore_eos=True),
    SamplingParams(max_new_tokens=24, temperature=1.5, top_k=20, seed=2**32 - 1, ignore_eos=True),
    SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.8, seed=3, ignore_eos=True),
    SamplingParams(max_new_tokens=24, temperature=2.0, min_p=0.1, seed=4, ignore_eos=True),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def engine(directory: pathlib.Path) -> KoGPT:
    return small_model.load(directory)


@pytest.fixture(scope="module")
def texts_engine(engine: KoGPT, tmp_path_factory: pytest.TempPathFactory) -> KoGPT:
    """The same model with a tokenizer: bytes, so that hardly a token is a character."""
    path = small_model.write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return KoGPT(engine.config, engine.leaves, engine.mesh, load_tokenizer(path))


@pytest.fixture(scope="module")
def alone(engine: KoGPT) -> dict[tuple[int, int], Completion]:
    """Each prompt continued by itself, greedily (key (prompt, -1)) and sampled (key (prompt, number in SAMPLED))."""
    completions = {}
    for index, row in enumerate(PROMPTS):
        (completions[index, -1],) = engine.generate_ids([row], greedy(24))
        number = index % len(SAMPLED)
        (completions[index, number],) = engine.generate_ids([row], SAMPLED[number])
    return completions


def assert_same(actual: Completion, expected: Completion, what: str) -> None:
    assert actual.token_ids == expected.token_ids, what
    tolerances.assert_close(actual.logprobs, expected.logprobs, tolerances.ROW_ALONE_VS_BATCH["fp32"], what)
    assert (actual.finish_reason, actual.usage) == (expected.finish_reason, expected.usage), what


# -- A row does not depend on its neighbours --------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [3, 4, 7])
def test_a_row_in_any_batch_is_the_row_alone(engine, alone, num_rows):
    """Slots, neighbours, their parameters and the padding around them vary."""
    rng = np.random.default_rng(num_rows)
    for _ in range(4):
        keys = [list(alone)[number] for number in rng.choice(len(alone), num_rows, replace=False)]
        params = [SAMPLED[number] if number >= 0 else greedy(24) for _, number in keys]
        completions = engine.generate_ids([PROMPTS[index] for index, _ in keys], params)
        for key, completion in zip(keys, completions, strict=True):
            assert_same(completion, alone[key], f"{key} among {keys}")


def test_a_row_beside_long_ones_is_the_row_alone(engine, alone):
    """Another prompt bucket, another capacity, and neighbours that run on for longer."""
    rows = [prompt(70), PROMPTS[1], prompt(41), PROMPTS[0], PROMPTS[4]]
    params = [SAMPLED[0], SAMPLED[1], greedy(50), greedy(24), greedy(24)]
    completions = engine.generate_ids(rows, params)
    for slot, key in ((1, (1, 1)), (3, (0, -1)), (4, (4, -1))):
        assert_same(completions[slot], alone[key], f"slot {slot}")
    assert len(completions[2].token_ids) == 50


def test_the_texts_of_these_rows_differ(alone):
    """Or the comparisons above would show nothing."""
    assert len({completion.token_ids for completion in alone.values()}) >= len(alone) - 1  # two prompts may meet
    assert all(len(set(completion.token_ids)) >= 2 for completion in alone.values())
    assert sum(len(set(completion.token_ids)) >= 8 for completion in alone.values()) >= len(alone) - 4


def test_equal_prompts_with_equal_seeds_have_equal_texts_and_other_seeds_other_texts(engine):
    params = [dataclasses.replace(SAMPLED[0], seed=seed) for seed in (5, 6, 5, 7)]
    first, second, third, fourth = engine.generate_ids([PROMPTS[3]] * 4, params)
    assert first == third
    assert len({first.token_ids, second.token_ids, fourth.token_ids}) == 3
    # Later tokens too: the noise is not the same at each step.
    assert len({first.token_ids[8:], second.token_ids[8:], fourth.token_ids[8:]}) == 3


def test_a_sampled_text_does_not_depend_on_where_it_is_cut(engine, alone):
    """Noise belongs to the position in the text: not to the step, nor to what is still to come."""
    for index, number in ((3, 3), (5, 1)):
        whole = alone[index, number].token_ids
        (shorter,) = engine.generate_ids([PROMPTS[index]], dataclasses.replace(SAMPLED[number], max_new_tokens=11))
        assert shorter.token_ids == whole[:11]
        (rest,) = engine.generate_ids([[*PROMPTS[index], *whole[:3]]], SAMPLED[number])
        assert rest.token_ids[:21] == whole[3:]


def test_without_a_seed_texts_differ(engine):
    params = dataclasses.replace(SAMPLED[0], seed=None)
    completions = engine.generate_ids([PROMPTS[3]] * 4, params) + engine.generate_ids([PROMPTS[3]] * 4, params)
    assert len({completion.token_ids for completion in completions}) == 8


def test_two_threads_start_their_programs_one_after_the_other(engine, monkeypatch):
    """Sums over devices need them in one order on all devices (`custom_ops.all_reduce`)."""
    engines = [KoGPT(CONFIG, engine.leaves, engine.mesh) for _ in range(2)]
    expected = [row.token_ids for row in engine.generate_ids(PROMPTS[:4], greedy(17))]
    is_starting = threading.Lock()
    met = []

    def watching(phase):
        def run(*args, **static):
            met.append(is_starting.acquire(blocking=False))
            time.sleep(0.01)  # for the other thread to come
            try:
                return phase(*args, **static)
            finally:
                is_starting.release()

        return run

    for name in ("prefill", "start_decode", "decode_loop"):
        monkeypatch.setattr(decoding, name, watching(getattr(decoding, name)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda engine: engine.generate_ids(PROMPTS[:4], greedy(17)), engines))
    assert [[row.token_ids for row in rows] for rows in results] == [expected, expected]
    assert len(met) == 2 * 4  # a prefill, the first token, two chunks
    assert all(met)


def test_a_run_again_is_the_same_bit_for_bit(engine):
    params = [SAMPLED[0], greedy(24), SAMPLED[2], SAMPLED[3]]
    assert engine.generate_ids(PROMPTS[:4], params) == engine.generate_ids(PROMPTS[:4], params)


def known(score: Score) -> list[float]:
    """The log-probabilities: of all tokens but the first, which has none."""
    assert score.logprobs[0] is None
    return [logprob for logprob in score.logprobs[1:] if logprob is not None]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits(engine, directory, dtype):
    """Logits near those of f32; decoding near the whole forward; a row among others near the row alone."""
    other = small_model.load(directory, dtype)
    rows = [prompt(100), *PROMPTS[1:4]]
    logits, expected = other.logits(rows[0]), engine.logits(rows[0])
    assert logits.dtype == np.float32
    tolerances.assert_close(logits, expected, tolerances.LOGITS_VS_FP32[dtype], dtype)
    assert tolerances.relative_error(logits, expected) > 1e-5, f"{dtype} computes in f32"
    completions = other.generate_ids(rows, greedy(24))
    texts = [(*row, *completion.token_ids) for row, completion in zip(rows, completions, strict=True)]
    scores = other.score_ids(texts)
    for row, score, completion in zip(rows, scores, completions, strict=True):
        whole = known(score)[len(row) - 1 :]
        tolerances.assert_close(completion.logprobs, whole, tolerances.CACHED_VS_WHOLE[dtype], f"{len(row)} tokens")
    (score_alone,) = other.score_ids(texts[:1])
    tolerances.assert_close(known(scores[0]), known(score_alone), tolerances.ROW_ALONE_VS_BATCH[dtype])


# -- Where a text ends ------------------------------------------------------------------------------------------------


def until_eos(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    ends = [index for index, token_id in enumerate(token_ids) if token_id in CONFIG.eos_token_ids]
    return token_ids[: ends[0] + 1] if ends else token_ids


def test_finish_reasons_and_usage(engine):
    unending = engine.generate_ids(PROMPTS, greedy(48))
    completions = engine.generate_ids(PROMPTS, SamplingParams(max_new_tokens=48))
    for row, went_on, completion in zip(PROMPTS, unending, completions, strict=True):
        assert went_on.finish_reason == "length"
        assert went_on.usage == Usage(len(row), 48)
        assert completion.token_ids == until_eos(went_on.token_ids)
        assert completion.logprobs == went_on.logprobs[: len(completion.token_ids)]
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in CONFIG.eos_token_ids else "length")
        assert completion.usage == Usage(len(row), len(completion.token_ids))
        assert completion.text is None  # no tokenizer
    last_tokens = {completion.token_ids[-1] for completion in completions if completion.finish_reason == "stop"}
    assert len(last_tokens) >= 2, "no two of the end-of-text ids met"
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_the_last_token_asked_for_may_be_eos(engine):
    """Then the reason is "stop": the text was over."""
    unending = engine.generate_ids(PROMPTS, greedy(48))
    for row, went_on in zip(PROMPTS, unending, strict=True):
        num_tokens = len(until_eos(went_on.token_ids))
        if num_tokens == 48:
            continue
        for max_new_tokens, reason in ((num_tokens, "stop"), (max(1, num_tokens - 1), "length")):
            (completion,) = engine.generate_ids([row], SamplingParams(max_new_tokens=max_new_tokens))
            assert len(completion.token_ids) == max_new_tokens
            assert completion.finish_reason == (reason if num_tokens > 1 else "stop")


@pytest.mark.parametrize("length", [CONFIG.max_len, CONFIG.max_len - 1, CONFIG.max_len - 9])
def test_a_text_ends_at_the_end_of_the_context(engine, length):
    """The last token is sampled and never read, so it stands one behind the context."""
    (completion,) = engine.generate_ids([prompt(length)], greedy(64))
    num_tokens = CONFIG.max_len - length + 1
    assert completion.usage == Usage(length, num_tokens)
    assert len(completion.token_ids) == len(completion.logprobs) == num_tokens
    assert completion.finish_reason == "length"
    whole = engine.logits([*prompt(length), *completion.token_ids[:-1]])
    assert whole.shape == (CONFIG.max_len, CONFIG.vocab_size)
    assert tuple(np.argmax(whole[length - 1 :], axis=-1).tolist()) == completion.token_ids


def test_a_prompt_of_one_token(engine):
    (completion,) = engine.generate_ids([[7]], greedy(5))
    logits = engine.logits([7, *completion.token_ids[:-1]])
    assert tuple(np.argmax(logits, axis=-1).tolist()) == completion.token_ids
    assert completion.usage == Usage(1, 5)


# -- Batches ----------------------------------------------------------------------------------------------------------


def batches_of(engine: KoGPT, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompt lengths of each batch that the engine runs from now on."""
    batches: list[list[int]] = []
    run_batch = engine._run_batch

    def watched(requests):
        batches.append([len(request.prompt_ids) for request in requests])
        return run_batch(requests)

    monkeypatch.setattr(engine, "_run_batch", watched)
    return batches


@pytest.mark.parametrize(("max_batch_size", "sizes"), [(1, [1] * 7), (4, [4, 3])])
def test_more_prompts_than_a_batch_holds_come_back_in_order(engine, alone, monkeypatch, max_batch_size, sizes):
    small = KoGPT(engine.config, engine.leaves, engine.mesh, max_batch_size=max_batch_size)
    batches = batches_of(small, monkeypatch)
    order = [3, 0, 6, 1, 5, 2, 4]
    completions = small.generate_ids([PROMPTS[index] for index in order], greedy(24))
    for index, completion in zip(order, completions, strict=True):
        assert_same(completion, alone[index, -1], f"prompt {index}")
    assert [len(batch) for batch in batches] == sizes
    assert list(itertools.chain(*batches)) == sorted(LENGTHS, reverse=True)  # like beside like


@pytest.mark.parametrize("max_batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(engine, max_batch_size):
    with pytest.raises(InputError, match=f"max_batch_size must be at least 1, got {max_batch_size}"):
        KoGPT(engine.config, engine.leaves, engine.mesh, max_batch_size=max_batch_size)


def test_batches_are_split_to_fit_the_memory(engine, alone, monkeypatch):
    batches = batches_of(engine, monkeypatch)
    monkeypatch.setattr(engine, "_free_bytes", lambda: engine._batch_bytes([(16, 24)] * 4))
    completions = engine.generate_ids(PROMPTS, greedy(24))
    assert [len(batch) for batch in batches] == [4, 3]
    assert sorted(itertools.chain(*batches)) == sorted(LENGTHS)
    for index, completion in enumerate(completions):
        assert_same(completion, alone[index, -1], f"prompt {index}")


def test_a_prompt_too_large_for_the_memory_is_refused_at_the_call(engine, monkeypatch):
    needed = engine._batch_bytes([(100, 51)])
    monkeypatch.setattr(engine, "_free_bytes", lambda: needed - 1)
    prompts = [prompt(1), prompt(100)]
    for call in (engine.generate_ids, engine.stream_ids):
        with pytest.raises(InputError) as caught:
            call(prompts, greedy(64))
        assert str(caught.value) == (
            f"prompt 1 of 100 tokens with 51 new ones needs {needed / 2**30:.1f} GiB of device memory, "
            f"{(needed - 1) / 2**30:.1f} GiB are free"
        )
    with pytest.raises(InputError, match="prompt 1 of 150 tokens"):
        engine.score_ids([prompt(2), prompt(150)])


def test_the_estimate_of_a_batch_holds_its_cache(engine):
    """That of the whole bucket: padding rows have pages too."""
    for num_rows, prompt_len, new_len, batch, capacity in ((1, 1, 1, 1, 64), (3, 60, 30, 4, 128), (8, 150, 1, 8, 192)):
        needed = engine._batch_bytes([(prompt_len, new_len)] * num_rows)
        assert needed > batch * kv_cache.cache_bytes_per_row(CONFIG, capacity)
        assert needed <= engine._batch_bytes([(prompt_len, new_len)] * batch) < 1.01 * needed
    assert 10**6 < engine._free_bytes() < 10**15  # of a CPU: what the host has available


def test_unused_bytes_are_those_of_the_fullest_device():
    class Device:
        def __init__(self, in_use: int):
            self.in_use = in_use

        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": self.in_use}

    assert engine_module._unused_bytes([Device(10), Device(70), Device(0)]) == 30


# -- Refusals ---------------------------------------------------------------------------------------------------------

TOO_LONG = prompt(CONFIG.max_len + 1)
REFUSED = [
    ([], None, "prompts is empty: nothing to"),
    ([[]], None, "prompt 0 is empty"),
    ([[1], [2], []], None, "prompt 2 is empty"),
    ([[1, 2], TOO_LONG], None, "prompt 1 has 151 tokens, more than the context of 150"),
    ([[1, CONFIG.vocab_size]], None, "prompt 0 holds token 259, outside vocab_size 259"),
    ([[1, 2], [3, -1]], None, "prompt 1 holds token -1, outside vocab_size 259"),
    ([[1, 2], [3, 4]], [SamplingParams()], "params must be one or one for each prompt, got 1 for 2 prompts"),
    ([[1, 2]], [], "params must be one or one for each prompt, got 0 for 1 prompts"),
    ([[1, 2], [3, 4.5]], None, "prompt 1 must be a sequence of token ids: 'float' object"),
    ([1, 2], None, "prompt 0 must be a sequence of token ids: 'int' object"),
    (["text"], None, "prompt 0 must be a sequence of token ids: 'str' object"),
]


@pytest.mark.parametrize(("prompt_ids", "params", "message"), REFUSED)
def test_refused_by_name_at_the_call(engine, prompt_ids, params, message):
    """By `stream_ids` too, and not only when the first event is asked for."""
    calls = [lambda: engine.generate_ids(prompt_ids, params), lambda: engine.stream_ids(prompt_ids, params)]
    if params is None:
        calls.append(lambda: engine.score_ids(prompt_ids))
    for call in calls:
        with unchecked_types(), pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(message)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("token_ids", [[], TOO_LONG, [CONFIG.vocab_size], [-1]], ids=["empty", "long", "high", "low"])
def test_logits_refuse_what_generate_refuses(engine, token_ids):
    with pytest.raises(InputError, match="^prompt 0 "):
        engine.logits(token_ids)


def test_texts_without_a_tokenizer_are_refused(engine):
    for call in (engine.generate, engine.stream, engine.score):
        with pytest.raises(InputError, match="has no tokenizer: use generate_ids, stream_ids or score_ids"):
            call("가")


def test_texts_are_refused_by_name(texts_engine):
    for call in (texts_engine.generate, texts_engine.stream, texts_engine.score):
        with pytest.raises(InputError, match="prompts is empty"):
            call([])
        with pytest.raises(InputError, match="prompt 1 is empty"):
            call(["가", ""])
        with pytest.raises(InputError, match="prompt 0 has 151 tokens"):
            call("a" * 151)


def test_bad_arguments_of_loading_are_refused_by_name(directory):
    refused: list[dict[str, Any]] = [
        {"quant": "w4"},
        {"implementation": "cudnn"},
        {"kv_dtype": "fp8"},
        {"kv_dtype": "bf16"},  # not the model's
        {"mesh": "big"},
        {"dtype": "fp8"},
    ]
    for arguments in refused:
        ((name, value),) = arguments.items()
        with unchecked_types(), pytest.raises(InputError, match=name) as caught:
            KoGPT.from_pretrained(directory, **arguments)
        assert repr(value) in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = small_model.write_byte_tokenizer(tmp_path / "tokenizer.json", num_more=10)
    with pytest.raises(InputError, match=r"tokenizer\.json has 267 tokens, more than vocab_size 259 of the model"):
        KoGPT.from_pretrained(tmp_path)
    assert path.exists()


# -- Texts and streams ------------------------------------------------------------------------------------------------

TEXTS = ["가나다", "a", "안녕", "1 2"]


def test_text_is_what_the_tokens_say(texts_engine):
    tokenizer = texts_engine.tokenizer
    completions = texts_engine.generate(TEXTS, greedy(24))
    for text, completion in zip(TEXTS, completions, strict=True):
        assert completion.text == tokenizer.decode([token_id for token_id in completion.token_ids if token_id < 257])
        assert completion.usage.prompt_tokens == len(text.encode())
        assert tokenizer.encode(text) == list(text.encode())
    assert texts_engine.generate_ids([tokenizer.encode(text) for text in TEXTS], greedy(24)) == completions
    assert texts_engine.generate(TEXTS[0], greedy(24))[0].token_ids == completions[0].token_ids


def test_eos_is_in_the_tokens_and_not_in_the_text(texts_engine):
    """Whether the tokenizer holds it for a special token or for a word."""
    unending = texts_engine.generate_ids(PROMPTS, greedy(48))
    completions = texts_engine.generate_ids(PROMPTS, SamplingParams(max_new_tokens=48))
    stopped = [(index, done) for index, done in enumerate(completions) if done.finish_reason == "stop"]
    assert len(stopped) >= 3
    for index, completion in stopped:
        *before, last = completion.token_ids
        assert last in CONFIG.eos_token_ids
        assert completion.token_ids == unending[index].token_ids[: len(completion.token_ids)]
        decode = texts_engine.tokenizer.decode_continuation
        readable = [token_id for token_id in PROMPTS[index] if token_id < 257]
        assert completion.text == decode(readable, [token_id for token_id in before if token_id < 257])
        assert EOS_NAME not in completion.text


def test_ids_beyond_the_tokenizer_have_no_text(texts_engine):
    """Vocabularies are padded: such a row of lm_head may win at a high temperature, and a prompt may hold its id."""
    params = SamplingParams(max_new_tokens=48, temperature=50.0, ignore_eos=True)
    completions = texts_engine.generate_ids(
        [[257, 258, 97]] * 8, [dataclasses.replace(params, seed=s) for s in range(8)]
    )
    assert any(token_id >= 257 for completion in completions for token_id in completion.token_ids)
    for completion in completions:
        assert completion.text is not None


def joined(events, num_prompts: int) -> list[tuple[str, tuple[int, ...], tuple[float, ...], list]]:
    """Of each prompt: its events' texts, tokens and log-probabilities, joined, and their reasons."""
    of = [[event for event in events if event.index == index] for index in range(num_prompts)]
    return [
        (
            "".join(event.text for event in row),
            tuple(itertools.chain(*(event.token_ids for event in row))),
            tuple(itertools.chain(*(event.logprobs for event in row))),
            [event.finish_reason for event in row],
        )
        for row in of
    ]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=48),
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=33, temperature=1.0, seed=3, ignore_eos=True),
    ],
    ids=["greedy", "one token", "sampled"],
)
def test_a_stream_is_generate_event_by_event(texts_engine, params):
    completions = texts_engine.generate_ids(PROMPTS, params)
    events = list(texts_engine.stream_ids(PROMPTS, params))
    for row, completion in zip(joined(events, len(PROMPTS)), completions, strict=True):
        *whole, reasons = row
        assert whole == [completion.text, completion.token_ids, completion.logprobs]
        assert reasons == [None] * (len(reasons) - 1) + [completion.finish_reason]
    assert all(event.token_ids for event in events)
    assert max(len(event.token_ids) for event in events) <= 8


def test_stream_of_texts(texts_engine):
    completions = texts_engine.generate(TEXTS, greedy(24))
    rows = joined(list(texts_engine.stream(TEXTS, greedy(24))), len(TEXTS))
    assert [row[0] for row in rows] == [completion.text for completion in completions]
    (event, *_) = texts_engine.stream(TEXTS[0], greedy(24))
    assert event.index == 0
    assert event.finish_reason is None


def test_a_stream_without_a_tokenizer_has_tokens_and_no_text(engine, alone):
    events = list(engine.stream_ids([PROMPTS[2]], greedy(24)))
    assert {event.text for event in events} == {None}
    assert tuple(itertools.chain(*(event.token_ids for event in events))) == alone[2, -1].token_ids


def test_a_stream_over_several_batches(engine, alone):
    small = KoGPT(engine.config, engine.leaves, engine.mesh, max_batch_size=4)
    tokens: dict[int, list[int]] = {}
    for event in small.stream_ids(PROMPTS, greedy(24)):
        tokens.setdefault(event.index, []).extend(event.token_ids)
    assert {index: tuple(ids) for index, ids in tokens.items()} == {
        index: alone[index, -1].token_ids for index in range(len(PROMPTS))
    }


def test_a_stream_left_half_way_leaves_the_engine_usable(engine, alone):
    stream = engine.stream_ids([PROMPTS[3]], greedy(24))
    next(stream)
    next(stream)
    del stream
    kept = engine.stream_ids([PROMPTS[4]], greedy(24))
    next(kept)
    (completion,) = engine.generate_ids([PROMPTS[3]], greedy(24))
    assert_same(completion, alone[3, -1], "after an abandoned stream")


def test_streams_side_by_side_do_not_mix(engine, alone):
    streams = [engine.stream_ids([PROMPTS[index]], greedy(24)) for index in (2, 5)]
    events = list(itertools.chain(*zip(*streams, strict=True)))
    for number, index in enumerate((2, 5)):
        token_ids = tuple(itertools.chain(*(event.token_ids for event in events[number::2])))
        assert token_ids == alone[index, -1].token_ids


def test_the_tokenizers_eos_counts_where_the_checkpoint_has_none_of_its_own(engine, texts_engine):
    assert texts_engine.config == engine.config  # the checkpoint's own ids count
    tokenizer = texts_engine.tokenizer
    for eos_token_ids, expected in (((), (256,)), ((50256,), (256,)), ((3, 7), (3, 7)), ((50256, 3), (50256, 3))):
        config = dataclasses.replace(KOGPT_6B, eos_token_ids=eos_token_ids)
        assert resolve_eos(config, tokenizer).eos_token_ids == expected
        assert resolve_eos(config, None) == config
    without = dataclasses.replace(CONFIG, eos_token_ids=())
    assert KoGPT(without, engine.leaves, engine.mesh, tokenizer).config.eos_token_ids == (256,)


# -- Scores and logits ------------------------------------------------------------------------------------------------


def test_scores_are_the_log_softmax_of_the_logits(engine):
    rows = [prompt(length) for length in (2, 7, 16, 150)]
    for row, score in zip(rows, engine.score_ids(rows), strict=True):
        assert score.token_ids == tuple(row)
        expected = log_softmax(engine.logits(row))[np.arange(len(row) - 1), row[1:]]
        assert len(score.logprobs) == len(row)
        tolerances.assert_close(known(score), expected, tolerances.LOGPROBS_VS_HF, f"{len(row)} tokens")
        assert score.perplexity == pytest.approx(np.exp(-np.mean(known(score))), rel=1e-12)
        assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)


def test_a_score_is_of_its_row_alone(engine):
    rows = [prompt(length) for length in (9, 2, 16, 5, 3)]
    together = engine.score_ids(rows)
    for row, score in zip(rows, together, strict=True):
        (alone_score,) = engine.score_ids([row])
        tolerances.assert_close(known(score), known(alone_score), tolerances.ROW_ALONE_VS_BATCH["fp32"])
    small = KoGPT(engine.config, engine.leaves, engine.mesh, max_batch_size=1)
    assert [score.token_ids for score in small.score_ids(rows)] == [tuple(row) for row in rows]


def test_scores_of_texts(texts_engine):
    (score, other) = texts_engine.score(["가나", "ab"])
    assert score.token_ids == tuple("가나".encode())
    assert other.token_ids == tuple(b"ab")
    assert score == dataclasses.replace(texts_engine.score_ids([list("가나".encode()), [97, 98]])[0])
    with pytest.raises(InputError, match="prompt 1 has 1 token, scoring needs at least 2"):
        texts_engine.score(["ab", "a"])


def test_logits_are_those_that_decoding_sees(engine, alone):
    for index, row in enumerate(PROMPTS):
        completion = alone[index, -1]
        logits = engine.logits([*row, *completion.token_ids[:-1]])[len(row) - 1 :]
        assert logits.shape == (24, CONFIG.vocab_size)
        assert tuple(np.argmax(logits, axis=-1).tolist()) == completion.token_ids
        expected = log_softmax(logits)[np.arange(24), completion.token_ids]
        tolerances.assert_close(completion.logprobs, expected, tolerances.CACHED_VS_WHOLE["fp32"], f"prompt {index}")


# -- Logits that are not finite ---------------------------------------------------------------------------------------


def with_leaf(engine: KoGPT, path: str, change) -> KoGPT:
    """The engine with one leaf changed."""
    leaves = [
        jax.device_put(change(np.array(leaf)), leaf.sharding) if param.path == path else leaf
        for param, leaf in zip(model_def(CONFIG).params, engine.leaves, strict=True)
    ]
    return KoGPT(engine.config, leaves, engine.mesh)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_name_the_prompt(engine, bad):
    def spoil(bias: np.ndarray) -> np.ndarray:
        bias[3] = bad
        return bias

    broken = with_leaf(engine, "lm_head_bias", spoil)
    for params in (greedy(24), SAMPLED[0]):
        with pytest.raises(
            FloatingPointError, match=r"prompt 0: the logits are not finite after 2 tokens .*dtype fp32"
        ):
            broken.generate_ids([PROMPTS[1]], params)
    with pytest.raises(FloatingPointError, match="prompt 0: the logits are not finite after 1 tokens"):
        broken.score_ids([PROMPTS[2]])
    stream = broken.stream_ids([PROMPTS[1]], greedy(24))
    with pytest.raises(FloatingPointError, match="prompt 0"):
        next(stream)


def test_only_the_row_that_meets_them_fails(engine, alone):
    """The embedding of one token is broken: rows without it are as ever, and the error says where it was met."""
    plain = {token_id for index in range(4) for token_id in (*PROMPTS[index], *alone[index, -1].token_ids)}
    row, position = next(
        (index, position)
        for index in (4, 5, 6)
        for position, token_id in enumerate(alone[index, -1].token_ids)
        if token_id not in plain and token_id not in PROMPTS[index] and position < 23
    )
    token = alone[row, -1].token_ids[position]

    def spoil(embedding: np.ndarray) -> np.ndarray:
        embedding[token] = np.nan
        return embedding

    broken = with_leaf(engine, "embedding", spoil)
    for completion, index in zip(broken.generate_ids(PROMPTS[:4], greedy(24)), range(4), strict=True):
        assert_same(completion, alone[index, -1], f"prompt {index}")
    num_tokens = len(PROMPTS[row]) + position + 1
    with pytest.raises(FloatingPointError, match=f"prompt 3: the logits are not finite after {num_tokens} tokens"):
        broken.generate_ids([*PROMPTS[:3], PROMPTS[row]], greedy(24))


def test_a_banned_token_is_no_error(engine, alone):
    """-inf in the bias of lm_head takes a token out; the rest is finite."""
    banned = alone[3, -1].token_ids[0]

    def ban(bias: np.ndarray) -> np.ndarray:
        bias[banned] = -np.inf
        return bias

    engine_without = with_leaf(engine, "lm_head_bias", ban)
    for params in (greedy(24), SAMPLED[0]):
        (completion,) = engine_without.generate_ids([PROMPTS[3]], params)
        assert banned not in completion.token_ids


# -- Random weights ---------------------------------------------------------------------------------------------------


def test_random_weights_are_those_of_their_seed():
    engines = [KoGPT.from_random(CONFIG, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([np.asarray(leaf) for leaf in engine.leaves] for engine in engines)
    for param, one, two, three in zip(model_def(CONFIG).params, first, again, other, strict=True):
        assert (one.shape, one.dtype) == (param.shape, param.dtype)
        np.testing.assert_array_equal(one, two)
        assert np.all(one != three) or np.mean(one != three) > 0.99, param.path
        assert abs(np.mean(one) - param.init_mean) < 0.02, param.path
    assert len({np.asarray(leaf).ravel()[:4].tobytes() for leaf in engines[0].leaves}) == len(first)
    assert jnp.all(jnp.isfinite(engines[0].logits([1, 2, 3])))


def test_a_perplexity_beyond_a_float_is_infinite():
    assert perplexity(1.0) == pytest.approx(np.e)
    assert perplexity(1000.0) == np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.generate(5), "prompts must be a text or a sequence of texts, got 5"),
        (lambda engine: engine.generate("x", {"max_new_tokens": 3}), "params must be SamplingParams, got 'max_new_"),
        (
            lambda engine: KoGPT.from_pretrained("demo", mesh=None),  # type: ignore[arg-type]
            "mesh must look like 'd1p1t1'",
        ),
        (
            lambda engine: KoGPT.from_pretrained("demo", max_batch_size=2.5),  # type: ignore[arg-type]
            "max_batch_size must be at least 1, got 2.5",
        ),
    ],
    ids=["prompts", "params", "mesh", "max_batch_size"],
)
def test_arguments_of_the_wrong_kind_are_named(texts_engine, call, message):
    with unchecked_types(), pytest.raises(InputError, match=message):
        call(texts_engine)


def test_scoring_a_long_row_holds_the_logits_of_one_block(engine):
    """A wide vocabulary over many positions: all logits at once would be 268 MB."""
    config = dataclasses.replace(CONFIG, vocab_size=16384, max_len=512, num_layers=1)
    wide = KoGPT.from_random(config)
    chunks = stack(pack([prompt(512)] * 8))
    lowered = decoding.score.lower(wide.leaves, chunks, **wide._static)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 3 * decoding.SCORE_BLOCK * config.vocab_size * 4
