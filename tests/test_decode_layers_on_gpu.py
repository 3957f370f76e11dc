"""`decode_layers` on a GPU: the tests of the op, and graphs that are kept, updated and left aside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode_layers import (
    EPSILON,
    KINDS,
    ROUNDED_KINDS,
    assert_same_bits,
    check_rows_alone,
    kind_id,
    make_case,
    op_by_op,
    run,
    test_a_row_alone_has_the_same_bits_and_a_head_is_optional,
    test_long_rows_have_the_bits_of_the_ops,
    test_what_the_kernels_do_not_take_is_named,
)
from test_decode_layers import test_one_call_gives_the_bits_of_its_ops as bits_of_its_ops
from test_decode_layers import test_the_reference_says_the_same as reference_says_the_same

from custom_ops import decode_layers, make_semaphores

__all__ = [
    "test_a_row_alone_has_the_same_bits_and_a_head_is_optional",
    "test_long_rows_have_the_bits_of_the_ops",
    "test_what_the_kernels_do_not_take_is_named",
]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS + ROUNDED_KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_one_call(dtype, kind):
    bits_of_its_ops(dtype, kind)
    reference_says_the_same(dtype, kind)
    case = make_case(dtype, **kind)
    check_rows_alone(case, run(case, "ffi"))


def test_graphs_of_many_arguments_follow_one_another():
    """More sets of arrays than graphs are kept, twice: each call has the results of its own arrays. In every third
    one a row is so long that its attention is a cluster of blocks, unlike that of the graph whose place it takes."""
    table = jnp.asarray([[4, 0, 4, 0, 4], [1, 7, 1, 7, 1], [2, 5, 3, 6, 8]], jnp.int32)
    lengths, num_new = jnp.asarray([0, 17, 70], jnp.int32), jnp.ones(3, jnp.int32)
    cases = []
    for number in range(20):
        case = make_case("bf16", quant=False, int8_cache=False, num_layers=1 + number % 2)
        if number % 3 == 0:
            case = dataclasses.replace(case, page_table=table, lengths=lengths, num_new=num_new)
        cases.append(case)
    expected = [jax.jit(lambda case=case: op_by_op(case))() for case in cases]
    for _ in range(2):
        for case, each in zip(cases, expected, strict=True):
            assert_same_bits(run(case, "ffi"), each)


@pytest.mark.parametrize("min_graph_size", [1, 2**31 - 1])
def test_within_a_loop_and_within_xlas_graphs(min_graph_size):
    """Pages are carried from step to step, whatever records or launches the kernels."""
    case = make_case("fp16", quant=False, int8_cache=False)

    def steps(x, k_pages, v_pages, implementation):
        def step(index, carry):
            x, k_pages, v_pages, semaphores = carry
            x, _, k_pages, v_pages, semaphores = decode_layers(
                x,
                case.layers,
                case.rotary,
                k_pages,
                v_pages,
                case.page_table,
                case.lengths + index * case.num_new,
                case.num_new,
                epsilon=EPSILON,
                semaphores=semaphores,
                implementation=implementation,
            )
            return x / 4, k_pages, v_pages, semaphores

        return jax.lax.fori_loop(0, 6, step, (x, k_pages, v_pages, make_semaphores()))[:3]

    compiled = jax.jit(
        steps, static_argnames="implementation", compiler_options={"xla_gpu_graph_min_graph_size": min_graph_size}
    )
    found = compiled(case.x, case.k_pages, case.v_pages, "ffi")
    expected = compiled(case.x, case.k_pages, case.v_pages, "reference")
    x, reference = np.asarray(found[0]), np.asarray(expected[0])
    assert np.abs(x - reference)[:2].max() < 0.05 * np.abs(reference[:2]).max()
    again = compiled(case.x, case.k_pages, case.v_pages, "ffi")
    assert_same_bits(again, found)
