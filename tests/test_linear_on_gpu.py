"""The tests of `custom_ops.linear` that hold on a GPU too, run there on the CUDA kernels."""

import pytest
from test_linear import (
    MANY_EARLY_SHAPES,
    MANY_INT8_EARLY_SHAPES,
    check_early_columns,
    test_a_prefetched_weight_gives_the_same_bits,
    test_a_row_is_the_same_bits_in_every_batch,
    test_each_row_alone_is_the_same_bits,
    test_early_columns_are_awaited,
    test_early_columns_are_awaited_beside_int8_weights,
    test_error_is_at_most_twice_the_references,
    test_inside_shard_map_nothing_is_gathered,
    test_reference_against_f64,
    test_semaphores_stay_in_place_and_order_the_calls,
    test_vmap_raises,
    test_what_the_kernels_do_not_support_is_refused_by_name,
)

__all__ = [
    "test_a_prefetched_weight_gives_the_same_bits",
    "test_a_row_is_the_same_bits_in_every_batch",
    "test_each_row_alone_is_the_same_bits",
    "test_early_columns_are_awaited",
    "test_early_columns_are_awaited_beside_int8_weights",
    "test_error_is_at_most_twice_the_references",
    "test_inside_shard_map_nothing_is_gathered",
    "test_reference_against_f64",
    "test_semaphores_stay_in_place_and_order_the_calls",
    "test_vmap_raises",
    "test_what_the_kernels_do_not_support_is_refused_by_name",
]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", MANY_EARLY_SHAPES, ids=str)
def test_early_columns_are_awaited_at_the_models_shape(shape):
    check_early_columns(*shape)


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("shape", MANY_INT8_EARLY_SHAPES, ids=str)
def test_early_columns_are_awaited_beside_int8_weights_at_the_models_shape(shape, int8_activations):
    check_early_columns(*shape, quant=True, int8_activations=int8_activations)
