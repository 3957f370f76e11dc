"""`decode_steps` beside what it consists of: the tokens, state and cache of `decode_layers` with the choice made by
`jax.numpy`, the reference within tolerance, and one clear error for what does not fit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from test_decode_layers import (
    DIM,
    DTYPES,
    EPSILON,
    KINDS,
    ROUNDED_KINDS,
    VOCAB,
    Case,
    assert_same_bits,
    kind_id,
    make_case,
    on_two_shards,
)

from custom_ops import NO_TOKEN, DecodedSteps, decode_layers, decode_steps, make_semaphores

CAPACITY = 32  # tokens of a row
VOCABS = [VOCAB, 1301]  # of one slice; of three, in rows that do not begin where 16 bytes do


@dataclasses.dataclass
class StepsCase:
    """Arguments of a call; those of its layers are ``case``'s, x and the angles apart."""

    case: Case
    tokens: jax.Array
    num_remaining: jax.Array
    ignore_eos: jax.Array
    embedding: jax.Array
    angles: tuple[jax.Array, ...]
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()

    def arguments(self, rows: Any = slice(None)) -> tuple[Any, ...]:
        """Of some rows alone."""
        case = self.case
        state = (self.tokens[rows], case.lengths[rows], self.num_remaining[rows], self.ignore_eos[rows])
        cache = (case.k_pages, case.v_pages, case.page_table[rows])
        return *state, self.embedding, self.angles, case.layers, *cache

    def options(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "eos_token_ids": self.eos_token_ids,
            "epsilon": EPSILON,
            "int8_activations": self.case.int8_activations,
        }


def make_steps(dtype: str, *, vocab: int = VOCAB, **options: Any) -> StepsCase:
    case = make_case(dtype, vocab=vocab, **options)
    angles = np.arange(CAPACITY)[:, None] * 100.0 ** -np.linspace(0, 1, 8)
    embedding = np.random.default_rng(8).standard_t(5, (vocab, DIM))
    return StepsCase(
        case=case,
        tokens=jnp.asarray([5, vocab - 1, 17], jnp.int32),
        num_remaining=jnp.asarray([9, 3, 0], jnp.int32),
        ignore_eos=jnp.asarray([False, True, False]),
        embedding=jnp.asarray(embedding, DTYPES[dtype]),
        angles=(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)),
        vocab_size=vocab,
    )


def with_bias(steps: StepsCase, bias: Any) -> StepsCase:
    """Logits that are this bias, whatever the layers give."""
    head = steps.case.head
    assert isinstance(head.lm_head, jax.Array)
    bias = jnp.asarray(bias, head.bias.dtype)
    head = head._replace(lm_head=jnp.zeros_like(head.lm_head), bias=bias)
    return dataclasses.replace(steps, case=dataclasses.replace(steps.case, head=head))


def run(
    steps: StepsCase, implementation: str, num_steps: int = 4, rows: Any = slice(None), **more: Any
) -> DecodedSteps:
    """What a jitted call gives."""

    def call(head, semaphores, *arguments):
        options = steps.options() | {"head": head, "semaphores": semaphores, "num_steps": num_steps} | more
        return decode_steps(*arguments, **options, implementation=implementation)

    return jax.jit(call)(steps.case.head, make_semaphores(), *steps.arguments(rows))


def step_by_step(steps: StepsCase, num_steps: int = 4, **sums: Any) -> DecodedSteps:
    """Lookup, `decode_layers` and choice one after another, with the kernels; with ``sum_over`` and ``device_groups``
    of the layers alone, where each device's head is its own."""
    case, state = steps.case, (steps.tokens, steps.case.lengths, steps.num_remaining)
    k_pages, v_pages, semaphores = case.k_pages, case.v_pages, make_semaphores()
    emitted = []
    for _ in range(num_steps):
        tokens, lengths, num_remaining = state
        is_running = num_remaining > 0
        _, logits, k_pages, v_pages, semaphores = decode_layers(
            steps.embedding[tokens].astype(jnp.float32),
            case.layers,
            tuple(table[jnp.minimum(lengths, CAPACITY - 1)] for table in steps.angles),  # type: ignore[arg-type]
            k_pages,
            v_pages,
            case.page_table,
            lengths,
            is_running.astype(jnp.int32),
            epsilon=EPSILON,
            head=case.head,
            semaphores=semaphores,
            prefetch_weights=True,
            int8_activations=case.int8_activations,
            implementation="ffi",
            **sums,
        )
        assert logits is not None
        if sums:
            logits = jax.lax.all_gather(logits, sums["sum_over"], axis=1, tiled=True)
        logits = logits[:, : steps.vocab_size]
        token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        is_eos = jnp.isin(token, np.array(steps.eos_token_ids, np.int32)) & ~steps.ignore_eos
        state = (
            jnp.where(is_running, token, tokens),
            lengths + is_running,
            jnp.where(is_running & ~is_eos, num_remaining - 1, 0),
        )
        emitted.append((jnp.where(is_running, token, NO_TOKEN), jnp.where(is_running, logprob, 0)))
    new_tokens, logprobs = (jnp.stack(parts, axis=1) for parts in zip(*emitted, strict=True))
    return DecodedSteps(*state, new_tokens, logprobs, k_pages, v_pages, semaphores)


def assert_same_steps(found: DecodedSteps, expected: DecodedSteps) -> None:
    """Tokens, state and cache to the bit, log-probabilities within tolerance."""
    tolerances.assert_close(found.logprobs, expected.logprobs, tolerances.LOGPROBS_OF_STEPS)
    nothing: dict[str, Any] = {"logprobs": jnp.zeros(0), "semaphores": jnp.zeros(0)}
    assert_same_bits(found._replace(**nothing), expected._replace(**nothing))
    assert not np.asarray(found.semaphores).any()


@pytest.mark.host
@pytest.mark.parametrize("kind", KINDS + ROUNDED_KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_steps_in_one_call_are_those_one_by_one(dtype, kind):
    for vocab in VOCABS:
        steps = make_steps(dtype, vocab=vocab, **kind)
        expected = jax.jit(lambda steps=steps: step_by_step(steps))()
        new_tokens = np.asarray(expected.new_tokens)
        assert len(set(new_tokens[0].tolist())) > 1, new_tokens
        assert (new_tokens == NO_TOKEN).tolist() == [[False] * 4, [False] * 3 + [True], [True] * 4]
        for prefetch_weights in (False, True):
            assert_same_steps(run(steps, "ffi", prefetch_weights=prefetch_weights), expected)


@pytest.mark.host
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_reference_says_the_same(dtype, kind):
    """Up to a token that differs, where two are about as likely."""
    steps = make_steps(dtype, **kind)
    found, expected = run(steps, "ffi"), run(steps, "reference")
    for row in range(2):
        differs = np.flatnonzero(np.asarray(found.new_tokens[row] != expected.new_tokens[row]))
        same = differs[0] if differs.size else 4
        assert same >= 1, (found.new_tokens, expected.new_tokens)
        logprobs = (found.logprobs[row, :same], expected.logprobs[row, :same])
        tolerances.assert_close(*logprobs, tolerances.STEP_OF_KERNELS[dtype])
    for name in ("lengths", "num_remaining"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.host
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_row_alone_has_the_same_bits(num_layers):
    steps = make_steps("fp16", num_layers=num_layers, vocab=1301)
    found = run(steps, "ffi")
    for row in range(3):
        alone = run(steps, "ffi", rows=slice(row, row + 1))
        for name in ("tokens", "lengths", "num_remaining", "new_tokens", "logprobs"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(found, name)[row], err_msg=name)
        pages = np.asarray(steps.case.page_table[row])
        for a, b in zip((*alone.k_pages, *alone.v_pages), (*found.k_pages, *found.v_pages), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[pages], np.asarray(b)[pages])


@pytest.mark.host
def test_calls_follow_one_another():
    """The state that a call gives back is what the next one begins with."""
    steps = make_steps("fp16")
    expected = run(steps, "ffi", 5)
    state, emitted = steps, []
    for num_steps in (2, 1, 2):
        found = run(state, "ffi", num_steps)
        emitted.append(found.new_tokens)
        case = dataclasses.replace(
            steps.case, lengths=found.lengths, k_pages=list(found.k_pages), v_pages=list(found.v_pages)
        )
        state = dataclasses.replace(steps, case=case, tokens=found.tokens, num_remaining=found.num_remaining)
    np.testing.assert_array_equal(np.concatenate(emitted, axis=1), expected.new_tokens)
    nothing: dict[str, Any] = {"new_tokens": jnp.zeros(0), "logprobs": jnp.zeros(0)}
    assert_same_bits(found._replace(**nothing), expected._replace(**nothing))


@pytest.mark.host
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_an_end_of_text_ends_a_row_that_does_not_ignore_it(implementation):
    bias = np.zeros(VOCAB)
    bias[42] = 3
    steps = dataclasses.replace(
        with_bias(make_steps("fp16"), bias), num_remaining=jnp.asarray([9, 3, 1], jnp.int32), eos_token_ids=(7, 42)
    )
    found = run(steps, implementation)
    none = NO_TOKEN
    assert found.new_tokens.tolist() == [[42, none, none, none], [42, 42, 42, none], [42, none, none, none]]
    assert found.num_remaining.tolist() == [0, 0, 0]
    assert found.lengths.tolist() == [1, 20, 32]
    expected = 3 - np.log(np.exp(3) + VOCAB - 1)
    is_emitted = np.asarray(found.new_tokens) != NO_TOKEN
    logprobs = np.where(is_emitted, expected, 0)
    tolerances.assert_close(found.logprobs, logprobs, tolerances.LOGPROBS_OF_STEPS)
    assert run(dataclasses.replace(steps, eos_token_ids=(7,)), implementation).num_remaining.tolist() == [5, 0, 0]


@pytest.mark.host
@pytest.mark.parametrize(
    ("values", "token", "is_number"),  # of 1,301 logits those that are not 0, and what is chosen
    [
        ({1299: 2.0, 700: 2.0, 30: 2.0}, 30, True),
        ({1300: 2.0, 699: 2.0}, 699, True),
        ({7: -0.0}, 0, True),
        ({700: np.nan, 600: np.nan, 3: np.inf}, 600, False),
        ({1300: np.nan}, 1300, False),
        ({1100: np.inf, 1101: np.inf}, 1100, False),
        ({range(1024): -np.inf, 1200: -5.0}, 1024, True),
        ({range(1301): -np.inf}, 0, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_of_equal_logits_the_first_is_taken_and_what_is_no_number_shows(values, token, is_number, implementation):
    bias = np.zeros(1301)
    for places, value in values.items():
        bias[places] = value
    found = run(with_bias(make_steps("fp16", vocab=1301, num_layers=1), bias), implementation, 2)
    assert found.new_tokens.tolist() == [[token] * 2, [token] * 2, [NO_TOKEN] * 2]
    assert np.isnan(found.logprobs).tolist() == [[not is_number] * 2, [not is_number] * 2, [False] * 2]
    if is_number:
        exact = bias[token] - np.log(np.exp(bias).sum())
        tolerances.assert_close(found.logprobs[:2], np.full((2, 2), exact), tolerances.LOGPROBS_OF_STEPS)


@pytest.mark.host
@pytest.mark.parametrize("vocab_size", [1300, 1024, 300])
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_padding_behind_the_vocabulary_is_no_token(implementation, vocab_size):
    bias = np.zeros(1304)
    bias[vocab_size:] = 100.0
    bias[vocab_size - 1] = 1.0
    steps = with_bias(make_steps("fp16", vocab=1304, num_layers=1), bias)
    found = run(dataclasses.replace(steps, vocab_size=vocab_size), implementation, 2)
    assert found.new_tokens[:2].tolist() == [[vocab_size - 1] * 2] * 2
    exact = np.full((2, 2), 1 - np.log(np.e + vocab_size - 1))
    tolerances.assert_close(found.logprobs[:2], exact, tolerances.LOGPROBS_OF_STEPS)


def on_shard(steps: StepsCase, case: Case, num_shards: int = 2) -> StepsCase:
    """These steps with a case whose layers are this device's, and its shard of the vocabulary; in `jax.shard_map`."""
    rank = jax.lax.axis_index("tensor")

    def own(array: jax.Array) -> jax.Array:
        padded = -(-array.shape[0] // num_shards) * num_shards
        padded_array = jnp.pad(array, ((0, padded - array.shape[0]), *[(0, 0)] * (array.ndim - 1)), constant_values=50)
        return padded_array.reshape(num_shards, -1, *array.shape[1:])[rank]

    head = case.head._replace(lm_head=jax.tree.map(own, case.head.lm_head), bias=own(case.head.bias))
    return dataclasses.replace(steps, case=dataclasses.replace(case, head=head), embedding=own(steps.embedding))


@pytest.mark.parametrize("vocab", VOCABS)
def test_shards_are_the_whole(vocab):
    """By the reference: an odd number of tokens leaves padding on the second device."""
    steps = make_steps("fp32", vocab=vocab)

    def step(case: Case) -> tuple[Any, ...]:
        own = on_shard(steps, case)
        options = own.options() | {"head": own.case.head, "num_steps": 4, "sum_over": "tensor"}
        found = decode_steps(*own.arguments(), **options, implementation="reference")
        return found.new_tokens, found.logprobs, found.k_pages, found.v_pages

    new_tokens, logprobs, *pages = on_two_shards(steps.case, step)
    expected = run(steps, "reference")
    for shard in range(2):
        np.testing.assert_array_equal(new_tokens[shard], expected.new_tokens)
        tolerances.assert_close(logprobs[shard], expected.logprobs, tolerances.LOGPROBS_VS_MESH)
    for a, b in zip(*map(jax.tree.leaves, (pages, (expected.k_pages, expected.v_pages))), strict=True):
        tolerances.assert_close(a, b, tolerances.STEP_OF_KERNELS["fp32"])


@pytest.mark.parametrize("vocab_size", [VOCAB + 1, 0])
def test_a_vocabulary_is_what_all_shards_hold(vocab_size):
    """Two shards of 150 tokens hold 300."""
    steps = dataclasses.replace(make_steps("fp32"), vocab_size=vocab_size)

    def step(case: Case) -> tuple[Any, ...]:
        own = on_shard(steps, case)
        options = own.options() | {"head": own.case.head, "num_steps": 4, "sum_over": "tensor"}
        return decode_steps(*own.arguments(), **options, implementation="reference")

    with pytest.raises(ValueError, match=f"vocab_size must be from 1 to 300, .* got {vocab_size}"):
        on_two_shards(steps.case, step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": jnp.zeros(2, jnp.int32)}, r"ignore_eos must have shape \(2,\), got \(3,\)"),
        ({"tokens": jnp.zeros(3)}, "tokens must be int32, got float32"),
        ({"num_remaining": jnp.zeros(3)}, "num_remaining must be int32, got float32"),
        ({"ignore_eos": jnp.zeros(3, jnp.int32)}, "ignore_eos must be bool, got int32"),
        ({"embedding": jnp.zeros((VOCAB, DIM))}, "embedding must be float16, got float32"),
        (
            {"embedding": jnp.zeros((VOCAB - 1, DIM), jnp.float16)},
            r"embedding must have shape \(300, 128\), got \(299, 128\)",
        ),
        ({"angles": (jnp.zeros((4, 8)),)}, r"angles must be \(cos, sin\), got 1 arrays"),
        (
            {"angles": (jnp.zeros((4, 8)), jnp.zeros((3, 8)))},
            r"angles\[1\] must have shape \(4, 8\), got \(3, 8\)",
        ),
        ({"angles": (jnp.zeros((0, 8)),) * 2}, "at least one step and position, got 4 and 0"),
        (
            {"angles": (jnp.zeros((CAPACITY - 1, 8)),) * 2},
            "angles must be those of all 32 positions that the pages of a row have, got 31",
        ),
        ({"vocab_size": 0}, "vocab_size must be from 1 to 300, the rows of embedding on all devices, got 0"),
        ({"vocab_size": VOCAB + 1}, "vocab_size must be from 1 to 300, .* got 301"),
        ({"eos_token_ids": (7, -1)}, r"eos_token_ids must be in \[0, 2\^31\), got -1"),
        ({"eos_token_ids": (2**31,)}, r"eos_token_ids must be in \[0, 2\^31\), got 2147483648"),
        ({"eos_token_ids": (2**32 + 7,)}, r"eos_token_ids must be in \[0, 2\^31\), got 4294967303"),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_what_does_not_fit_is_named(change, message, implementation):
    steps = make_steps("fp16", num_layers=1)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(steps, **change), implementation)


@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_options_that_do_not_fit_are_named(implementation):
    steps = make_steps("fp16", num_layers=1)
    with pytest.raises(ValueError, match="at least one step and position, got 0 and 32"):
        run(steps, implementation, 0)
    with pytest.raises(ValueError, match="timeout_s must be 0.001 to 1e6 seconds, got 0"):
        run(steps, implementation, timeout_s=0.0)
    with pytest.raises(ValueError, match="int8_activations needs INT8 weights, got layers of float16"):
        run(steps, implementation, int8_activations=True)
    with pytest.raises(ValueError, match="got 1 layers, 0 and 1 pages"):
        run(dataclasses.replace(steps, case=dataclasses.replace(steps.case, k_pages=[])), implementation)


@pytest.mark.host
def test_what_the_kernels_do_not_take_is_named():
    steps = make_steps("fp16", num_layers=1)
    many = dataclasses.replace(
        steps,
        case=dataclasses.replace(
            steps.case, page_table=jnp.zeros((65, 2), jnp.int32), lengths=jnp.zeros(65, jnp.int32)
        ),
        tokens=jnp.zeros(65, jnp.int32),
        num_remaining=jnp.zeros(65, jnp.int32),
        ignore_eos=jnp.zeros(65, bool),
    )
    with pytest.raises(ValueError, match="tokens must be those of 1 to 64 rows .* got 65"):
        run(many, "ffi")
    with pytest.raises(ValueError, match="eos_token_ids must be at most 16, got 17"):
        run(dataclasses.replace(steps, eos_token_ids=tuple(range(17))), "ffi")
    with pytest.raises(ValueError, match="semaphores must be given"):
        run(steps, "ffi", semaphores=None)
