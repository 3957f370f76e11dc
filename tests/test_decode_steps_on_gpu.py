"""`decode_steps` on a GPU: the tests of the op, many rows, and graphs that are launched again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from test_decode_layers import DIM, DTYPES, KINDS, ROUNDED_KINDS, assert_same_bits, kind_id
from test_decode_steps import (
    CAPACITY,
    assert_same_steps,
    make_steps,
    run,
    step_by_step,
    test_a_row_alone_has_the_same_bits,
    test_an_end_of_text_ends_a_row_that_does_not_ignore_it,
    test_calls_follow_one_another,
    test_of_equal_logits_the_first_is_taken_and_what_is_no_number_shows,
    test_padding_behind_the_vocabulary_is_no_token,
    test_what_the_kernels_do_not_take_is_named,
)
from test_decode_steps import test_steps_in_one_call_are_those_one_by_one as steps_are_those_one_by_one
from test_decode_steps import test_the_reference_says_the_same as reference_says_the_same

from custom_ops import decode_steps, make_semaphores

__all__ = [
    "test_a_row_alone_has_the_same_bits",
    "test_an_end_of_text_ends_a_row_that_does_not_ignore_it",
    "test_calls_follow_one_another",
    "test_of_equal_logits_the_first_is_taken_and_what_is_no_number_shows",
    "test_padding_behind_the_vocabulary_is_no_token",
    "test_what_the_kernels_do_not_take_is_named",
]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS + ROUNDED_KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_steps(dtype, kind):
    steps_are_those_one_by_one(dtype, kind)
    if kind in KINDS:
        reference_says_the_same(dtype, kind)


@pytest.mark.parametrize("vocab", [64512, 70001])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_large_vocabulary(rows, vocab):
    """More slices than a warp takes at once, and as many rows as there may be; twice, with a graph that is kept."""
    steps = make_steps("bf16", num_layers=1, vocab=vocab)
    rng = np.random.default_rng(rows)

    def pages_of_rows(pages: list[Any]) -> list[Any]:
        return [jnp.tile(each, (15, 1, 1, 1))[: 2 * rows + 1] for each in pages]

    case = dataclasses.replace(
        steps.case,
        k_pages=pages_of_rows(steps.case.k_pages),
        v_pages=pages_of_rows(steps.case.v_pages),
        page_table=jnp.arange(2 * rows, dtype=jnp.int32).reshape(rows, 2),
        lengths=jnp.asarray(rng.integers(0, CAPACITY - 4, rows), jnp.int32),
    )
    steps = dataclasses.replace(
        steps,
        case=case,
        tokens=jnp.asarray(rng.integers(0, vocab, rows), jnp.int32),
        num_remaining=jnp.asarray(np.arange(9, 9 + rows) % 7, jnp.int32),
        ignore_eos=jnp.zeros(rows, bool),
    )
    expected = jax.jit(lambda: step_by_step(steps))()
    for _ in range(2):
        assert_same_steps(run(steps, "ffi"), expected)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_row_wider_than_a_block(dtype):
    """Of 4,104 values, without a LayerNorm by the kernel: the embedding in two rounds."""
    steps = make_steps(dtype, num_layers=1)
    wide = 4104
    case = steps.case

    def widened(array: jax.Array, axis: int, scale: float = 1.0) -> jax.Array:
        return jnp.tile(array, [wide // DIM + 1 if i == axis else 1 for i in range(array.ndim)]).take(
            jnp.arange(wide), axis=axis
        ) * jnp.asarray(scale, array.dtype)

    layer, head = case.layers[0], case.head
    assert isinstance(layer.w_in, jax.Array)
    assert isinstance(layer.w_out, jax.Array)
    assert isinstance(head.lm_head, jax.Array)
    layer = layer._replace(
        ln_scale=widened(layer.ln_scale, 0),
        ln_bias=widened(layer.ln_bias, 0),
        w_in=widened(layer.w_in, 1, DIM / wide),
        w_out=widened(layer.w_out, 0),
        b_ffn_out=widened(layer.b_ffn_out, 0),
    )
    head = head._replace(
        ln_scale=widened(head.ln_scale, 0),
        ln_bias=widened(head.ln_bias, 0),
        lm_head=widened(head.lm_head, 1, DIM / wide),
    )
    embedding = np.random.default_rng(9).standard_t(5, (steps.vocab_size, wide))
    steps = dataclasses.replace(
        steps,
        case=dataclasses.replace(case, layers=[layer], head=head),
        embedding=jnp.asarray(embedding, DTYPES[dtype]),
    )
    assert_same_steps(run(steps, "ffi"), jax.jit(lambda: step_by_step(steps))())


@pytest.mark.parametrize("min_graph_size", [1, 2**31 - 1])
def test_within_a_loop_and_within_xlas_graphs(min_graph_size):
    """State and pages are carried from call to call, whatever records or launches the kernels."""
    steps = make_steps("fp16")

    def calls(
        head, semaphores, tokens, lengths, num_remaining, ignore_eos, embedding, angles, layers, k, v, page_table
    ):
        def call(_, carry):
            state, pages, semaphores, logprobs = carry
            options: dict[str, Any] = steps.options() | {"head": head, "num_steps": 2, "semaphores": semaphores}
            arguments = (*state, ignore_eos, embedding, angles, layers, *pages, page_table)
            found = decode_steps(*arguments, **options, implementation="ffi")
            pages = [found.k_pages, found.v_pages]
            return found[:3], pages, found.semaphores, jnp.concatenate([logprobs[:, 2:], found.logprobs], axis=1)

        logprobs = jnp.zeros((len(tokens), 4), jnp.float32)
        carry = ((tokens, lengths, num_remaining), [k, v], semaphores, logprobs)
        return jax.lax.fori_loop(0, 2, call, carry)

    compiled = jax.jit(calls, compiler_options={"xla_gpu_graph_min_graph_size": min_graph_size})
    arguments = (steps.case.head, make_semaphores(), *steps.arguments())
    state, pages, _, logprobs = compiled(*arguments)
    expected = run(steps, "ffi")
    assert_same_bits((state, pages), (expected[:3], [expected.k_pages, expected.v_pages]))
    tolerances.assert_close(logprobs, expected.logprobs, tolerances.LOGPROBS_OF_STEPS)
    assert_same_bits(compiled(*arguments), compiled(*arguments))
