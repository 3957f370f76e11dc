"""Misuse must come back as an error from the CUDA library too."""

import jax.numpy as jnp
import pytest
from test_library import (
    assert_refused,
    make_operands,
    test_a_wrong_dtype_is_refused,
    test_a_wrong_extent_is_refused,
    test_a_wrong_rank_is_refused,
    test_gelu_from_beyond_the_outputs_is_refused,
    test_nothing_wrong,
    test_sizes_that_fit_each_other_but_not_the_op_are_refused,
    test_what_is_updated_in_place_must_be_aliased,
)

import custom_ops

__all__ = [
    "test_a_wrong_dtype_is_refused",
    "test_a_wrong_extent_is_refused",
    "test_a_wrong_rank_is_refused",
    "test_gelu_from_beyond_the_outputs_is_refused",
    "test_nothing_wrong",
    "test_sizes_that_fit_each_other_but_not_the_op_are_refused",
    "test_what_is_updated_in_place_must_be_aliased",
]

pytestmark = pytest.mark.gpu


def test_the_library_can_be_used():
    library = custom_ops.library_info()[1]
    assert (library.name, library.problem) == ("cuda", None)
    assert library.architectures


@pytest.mark.parametrize("target", ["kogpt_linear", "kogpt_decode_attention"])
def test_too_little_scratch_is_refused(target):
    operands = make_operands(target) | {"result partials": jnp.zeros(8)}
    assert_refused(target, operands, f"{target}: result partials must have at least ", "got 32")
