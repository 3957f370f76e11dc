"""What must hold on a GPU too: the goldens in f32, without TF32, and a cache that is updated in place."""

import pytest
from test_decoding import call, engine, test_the_cache_is_updated_in_place, test_without_donation_it_is_not
from test_goldens import loaded, test_greedy_text_of_a_prompt_alone, test_greedy_text_of_a_ragged_batch, test_logits

__all__ = [
    "call",
    "engine",
    "loaded",
    "test_greedy_text_of_a_prompt_alone",
    "test_greedy_text_of_a_ragged_batch",
    "test_logits",
    "test_the_cache_is_updated_in_place",
    "test_without_donation_it_is_not",
]

pytestmark = pytest.mark.gpu
