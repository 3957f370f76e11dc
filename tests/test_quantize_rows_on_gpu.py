"""The tests of `custom_ops.quantize_rows`, run on the CUDA kernel."""

import jax
import jax.numpy as jnp
import pytest
from test_quantize_rows import (
    test_a_row_is_the_same_bits_in_every_batch,
    test_a_row_without_layer_norm_is_quantised_as_a_weight_is,
    test_against_f64,
    test_arguments_that_do_not_fit_are_refused_by_name,
    test_halves_round_to_even,
    test_rows_of_zeros_and_rows_that_are_not_finite,
)

import custom_ops

__all__ = [
    "test_a_row_is_the_same_bits_in_every_batch",
    "test_a_row_without_layer_norm_is_quantised_as_a_weight_is",
    "test_against_f64",
    "test_arguments_that_do_not_fit_are_refused_by_name",
    "test_halves_round_to_even",
    "test_rows_of_zeros_and_rows_that_are_not_finite",
]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("shape", "message"), [((4, 24), "K must be a multiple of 16"), ((0, 32), "at least one row")])
def test_what_the_kernel_does_not_support_is_refused_by_name(shape, message):
    with pytest.raises(ValueError, match=message):
        custom_ops.quantize_rows(jnp.ones(shape), implementation="ffi")


def test_vmap_raises():
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda x: custom_ops.quantize_rows(x, implementation="ffi"))(jnp.ones((2, 3, 32)))
