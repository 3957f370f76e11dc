"""Deterministic mode through the CUDA kernels."""

import pytest
from test_deterministic import (
    engine,
    test_a_row_in_a_thousand_batches_is_the_row_alone,
    test_a_row_is_put_into_a_batch_in_place,
    test_a_text_scored_among_others_is_the_text_alone,
)

__all__ = [
    "engine",
    "test_a_row_in_a_thousand_batches_is_the_row_alone",
    "test_a_row_is_put_into_a_batch_in_place",
    "test_a_text_scored_among_others_is_the_text_alone",
]

pytestmark = pytest.mark.gpu
