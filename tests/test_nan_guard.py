"""`nan_guard`: the first op whose output is not finite is named, in every phase; without it no program knows of it."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from small_model import CONFIG, KERNEL_CONFIG, greedy, prompt
from test_decoding import make_call

from kogpt_jax import KoGPT, model

PROMPTS = [prompt(length) for length in (5, 20, 70)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> KoGPT:
    return small_model.load(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def guarded(engine: KoGPT) -> KoGPT:
    return KoGPT(engine.config, engine.leaves, engine.mesh, nan_guard=True)


def poisoned(engine: KoGPT, path: str, change: Callable[[jax.Array], jax.Array]) -> KoGPT:
    """The model with one parameter changed, in the same programs."""
    leaves = list(engine.leaves)
    index = [param.path for param in engine._definition.params].index(path)
    leaves[index] = jax.device_put(change(leaves[index]), leaves[index].sharding)
    spoilt = copy.copy(engine)
    spoilt.leaves = tuple(leaves)
    return spoilt


def message_of(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(FloatingPointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def first_in(call: Callable[..., Any], *args: Any) -> str:
    return message_of(call, *args).split("first in its batch: ")[1]


# Of the last shard, so that on a mesh too the op is the first that one device sees.
POISONS: list[tuple[str, Callable[[jax.Array], jax.Array], str]] = [
    ("embedding", lambda w: w.at[:, 3].set(np.nan), "embedding"),
    ("blocks.0.ln_scale", lambda w: w.at[..., 3].set(np.inf), "w_in of layer 0"),
    ("blocks.1.w_in", lambda w: w.at[..., 5, :].set(np.nan), "w_in of layer 1"),
    ("blocks.1.b_ffn_in", lambda w: w.at[..., -1].set(np.inf), "w_in of layer 1"),
    # Queries and keys of 1e30 are finite, their products are not.
    ("blocks.1.w_in", lambda w: w.at[..., : 2 * CONFIG.model_dim, :].multiply(1e30), "attention of layer 1"),
    ("blocks.0.w_out", lambda w: w.at[..., 7, 3].set(np.inf), "w_out of layer 0"),
    ("blocks.1.b_ffn_out", lambda w: w.at[..., 7].set(np.nan), "w_out of layer 1"),
]


@pytest.mark.parametrize(("path", "change", "op"), POISONS, ids=[f"{path}-{op}" for path, _, op in POISONS])
def test_the_first_op_is_named(guarded, path, change, op):
    spoilt = poisoned(guarded, path, change)
    assert first_in(spoilt.generate_ids, PROMPTS, greedy(3)) == f"{op}, in prefill at position 0"
    assert first_in(spoilt.score_ids, PROMPTS) == f"{op}, in prefill at position 0"


@pytest.mark.parametrize(
    ("path", "op"), [("ln_f_bias", "ln_f"), ("ln_f_scale", "ln_f"), ("lm_head", "lm_head"), ("lm_head_bias", "lm_head")]
)
def test_the_last_ops_are_named(guarded, path, op):
    spoilt = poisoned(guarded, path, lambda w: w.at[2].set(np.inf))
    assert first_in(spoilt.generate_ids, PROMPTS, greedy(3)) == op
    assert first_in(spoilt.score_ids, PROMPTS) == op


def with_poisoned_token(engine: KoGPT, token: int) -> KoGPT:
    """A model for which one token is not finite."""
    return poisoned(engine, "embedding", lambda w: w.at[token].set(np.nan))


@pytest.mark.slow
def test_a_token_that_is_only_met_when_decoding(guarded):
    """The row that samples it, its position, and not the rows beside it; then a batch without it."""
    rows = [completion.token_ids for completion in guarded.generate_ids(PROMPTS, greedy(12))]
    used = {token for row in PROMPTS for token in row}
    index, step = next((i, j) for i, row in enumerate(rows) for j in range(1, 11) if row[j] not in used | set(row[:j]))
    spoilt = with_poisoned_token(guarded, rows[index][step])
    position = len(PROMPTS[index]) + step
    message = message_of(spoilt.generate_ids, [PROMPTS[index]], greedy(12))
    assert f"not finite after {position + 1} tokens" in message
    assert message.endswith(f"first in its batch: embedding, in decode_step at position {position}")
    assert spoilt.generate_ids([PROMPTS[index]], greedy(step + 1))[0].token_ids == rows[index][: step + 1]
    scored = [*PROMPTS[index], *rows[index]]
    assert first_in(spoilt.score_ids, [PROMPTS[index], scored]) == f"embedding, in prefill at position {position}"


@pytest.mark.parametrize(
    ("function", "call", "op"),
    [
        ("decode_linear", 2, "w_in of layer 1, in decode_step at position 20"),
        ("decode_attention", 1, "attention of layer 1, in decode_step at position 20"),
        ("decode_linear", 4, "lm_head"),
    ],
)
def test_an_op_of_a_decode_step_that_fails(engine, monkeypatch, function, call, op):
    """As a kernel's fault would: one call of a step's gives NaN in its first output."""
    run = getattr(model, function)
    calls: Iterator[int] = itertools.cycle(range(CONFIG.num_layers))
    if function == "decode_linear":  # the first are prefill's last layer and the logits behind the prompt
        calls = itertools.chain([-1] * 3, itertools.cycle(range(5)))

    def broken(*args: Any, **options: Any) -> Any:
        first, *others = run(*args, **options)
        return jnp.where(next(calls) == call, jnp.nan, first), *others

    monkeypatch.setattr(model, function, broken)
    # Whose prefill has two such calls on any machine.
    spoilt = KoGPT(engine.config, engine.leaves, engine.mesh, nan_guard=True, implementation="reference")
    assert first_in(spoilt.generate_ids, [PROMPTS[1]], greedy(3)) == op


def test_fp16_that_overflows(engine):
    """Finite weights: GELU's input leaves the range of fp16 in the second layer."""
    config = dataclasses.replace(CONFIG, dtype="fp16")
    leaves = [
        leaf.astype(param.dtype) for leaf, param in zip(engine.leaves, model.model_def(config).params, strict=True)
    ]
    half = KoGPT(config, leaves, engine.mesh, nan_guard=True)
    spoilt = poisoned(half, "blocks.1.w_in", lambda w: jnp.where(w > 0, 60000, -60000).astype(w.dtype))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in spoilt.leaves)
    message = message_of(spoilt.score_ids, [PROMPTS[1]])
    assert re.search(
        "dtype fp16; fp16 can overflow.*first in its batch: w_in of layer 1, in prefill at position", message
    )


def test_a_banned_token_is_not_blamed(guarded):
    """-inf in the bias of lm_head is no fault; what comes later is."""
    token_ids = guarded.generate_ids([PROMPTS[1]], greedy(12))[0].token_ids
    step = next(j for j in range(1, 11) if token_ids[j] not in {*PROMPTS[1], *token_ids[:j]})
    banned = next(token for token in range(CONFIG.vocab_size) if token not in token_ids)
    spoilt = poisoned(
        with_poisoned_token(guarded, token_ids[step]), "lm_head_bias", lambda b: b.at[banned].set(-np.inf)
    )
    expected = f"embedding, in decode_step at position {len(PROMPTS[1]) + step}"
    assert first_in(spoilt.generate_ids, [PROMPTS[1]], greedy(12)) == expected


def test_what_an_earlier_call_found_is_forgotten(guarded):
    token = next(token for token in range(CONFIG.vocab_size) if not any(token in row for row in PROMPTS))
    spoilt = with_poisoned_token(guarded, token)
    for position in (7, 3):
        row = [*PROMPTS[2][:position], token, *PROMPTS[2][position + 1 :]]
        assert first_in(spoilt.score_ids, [row]) == f"embedding, in prefill at position {position}"
        assert first_in(spoilt.generate_ids, [row], greedy(2)) == f"embedding, in prefill at position {position}"


def test_a_guard_changes_no_result(engine, guarded):
    assert guarded.generate_ids(PROMPTS, greedy(10)) == engine.generate_ids(PROMPTS, greedy(10))
    assert guarded.score_ids(PROMPTS) == engine.score_ids(PROMPTS)


@pytest.mark.parametrize("phase", ["prefill", "decode_loop"])
def test_without_a_guard_no_program_knows_of_it(engine, monkeypatch, phase):
    """The program is the one of a model whose checks are taken out, and with a guard it is another."""

    def lowered(nan_guard: bool) -> str:
        call = make_call(KoGPT(engine.config, engine.leaves, engine.mesh, nan_guard=nan_guard), phase)
        # Of the function itself, or jit would remember the other model's.
        jitted = jax.jit(lambda *args: call.donating.__wrapped__(*args, **call.static))
        return jitted.lower(*call.args).as_text()

    assert "callback" in lowered(nan_guard=True)
    assert "is_finite" in lowered(nan_guard=True)
    without = lowered(nan_guard=False)
    assert "callback" not in without
    monkeypatch.setattr(model, "no_check", lambda *_: None)
    assert lowered(nan_guard=False) == without


def test_without_a_guard_the_error_tells_of_it(engine):
    message = message_of(with_poisoned_token(engine, PROMPTS[0][0]).score_ids, PROMPTS[:1])
    assert message.endswith("; nan_guard=True or --nan-guard tells which op is the first")


@pytest.mark.slow
def test_on_a_mesh():
    """Rows, layers and heads over eight devices; the fault is in the second stage, of the last heads' shard."""
    config = dataclasses.replace(KERNEL_CONFIG, kv_dtype="int8")
    engine = KoGPT.from_random(config, mesh="d2p2t2", nan_guard=True)
    engine.generate_ids(PROMPTS, greedy(2))
    # The only block of each stage: layer 0 and layer 1.
    spoilt = poisoned(engine, "blocks.0.w_in", lambda w: w.at[1, 1, 3].set(np.nan))
    for call, arguments in ((spoilt.generate_ids, [greedy(2)]), (spoilt.score_ids, [])):
        assert first_in(call, PROMPTS, *arguments) == "w_in of layer 1, in prefill at position 0"
