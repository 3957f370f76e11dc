"""The tests of `custom_ops.decode_attention` that hold on a GPU too, run there on the CUDA kernels."""

import pytest
from test_decode_attention import (
    test_a_prefetched_cache_gives_the_same_bits,
    test_a_row_is_the_same_bits_in_every_batch,
    test_both_ways_of_the_reference,
    test_cache_and_result_are_updated_in_place,
    test_error_is_at_most_twice_the_references,
    test_inside_shard_map_nothing_is_gathered,
    test_reference_against_f64,
    test_vmap_raises,
    test_what_the_kernels_do_not_support_is_refused_by_name,
)
from test_int8_cache import (
    test_a_head_that_is_not_finite_shows_and_one_of_zeros_does_not,
    test_decode_error_is_at_most_twice_the_references,
)
from test_int8_cache import (
    test_a_row_is_the_same_bits_in_every_batch as test_a_row_of_an_int8_cache_is_the_same_bits_in_every_batch,
)

__all__ = [
    "test_a_head_that_is_not_finite_shows_and_one_of_zeros_does_not",
    "test_a_prefetched_cache_gives_the_same_bits",
    "test_a_row_is_the_same_bits_in_every_batch",
    "test_a_row_of_an_int8_cache_is_the_same_bits_in_every_batch",
    "test_both_ways_of_the_reference",
    "test_cache_and_result_are_updated_in_place",
    "test_decode_error_is_at_most_twice_the_references",
    "test_error_is_at_most_twice_the_references",
    "test_inside_shard_map_nothing_is_gathered",
    "test_reference_against_f64",
    "test_vmap_raises",
    "test_what_the_kernels_do_not_support_is_refused_by_name",
]

pytestmark = pytest.mark.gpu
