"""Misuse must come back as an error from the CUDA library too."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_library import (
    ALIASES,
    PARTS_OF_PAGES,
    assert_refused,
    call,
    changed,
    check_that_an_int8_cache_is_refused,
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


# The CUDA library's own.
PREFILL = "kogpt_prefill_attention"
PREFILL_OPERANDS = [name for name in make_operands(PREFILL) if name not in ALIASES[PREFILL].values()]


def test_nothing_wrong_with_prefill_attention():
    call(PREFILL, make_operands(PREFILL))


@pytest.mark.parametrize("name", PREFILL_OPERANDS)
def test_a_wrong_rank_or_dtype_of_prefill_attention_is_refused(name):
    operands = changed(PREFILL, name, lambda value: value[None])
    assert_refused(PREFILL, operands, f"{PREFILL}: {name} must have ", str(list(operands[name].shape)))
    operands = changed(PREFILL, name, lambda value: value.astype(jnp.uint16))
    assert_refused(PREFILL, operands, f"{PREFILL}: {name} must have dtype ", "got type 7")


@pytest.mark.parametrize(
    ("name", "axis", "blamed"),
    [
        ("qkv", 0, "qkv"),
        ("cos", 0, "cos"),
        ("cos", 1, "sin"),
        ("sin", 0, "sin"),
        ("k_pages", 0, "v_pages"),
        ("k_pages", 1, "qkv"),
        ("k_pages", 2, "v_pages"),
        ("k_pages", 3, "qkv"),
        ("page_table", 0, "begins"),
        ("begins", 0, "begins"),
        ("num_new", 0, "num_new"),
        ("lengths", 0, "lengths"),
        ("act", 0, "qkv"),
    ],
)
def test_a_wrong_extent_of_prefill_attention_is_refused(name, axis, blamed):
    operands = changed(PREFILL, name, lambda value: jnp.repeat(value, 2, axis))
    assert_refused(PREFILL, operands, f"{PREFILL}: {blamed} must have shape ", "got ")


@pytest.mark.parametrize("name", ALIASES[PREFILL])
def test_what_prefill_attention_updates_in_place_must_be_aliased(name):
    assert_refused(PREFILL, make_operands(PREFILL), f"{PREFILL}: {name} must be aliased", without_alias=name)


@pytest.mark.parametrize("name", PARTS_OF_PAGES)
def test_an_int8_cache_that_does_not_fit_prefill_attention_is_refused(name, monkeypatch):
    check_that_an_int8_cache_is_refused(PREFILL, name, monkeypatch)


def test_what_prefill_attention_does_not_take_is_refused():
    operands = make_operands(PREFILL)
    assert_refused(PREFILL, operands, f"{PREFILL}: ", "max_new", max_new=np.int64(-1))
    too_little = operands | {"result tiles": jnp.zeros((2, 4), jnp.int32)}
    assert_refused(PREFILL, too_little, f"{PREFILL}: result tiles must have at least 48 bytes, got 32")
    narrow = {name: operands[name][:, :, :32] for name in ("k_pages", "v_pages", "result k_pages", "result v_pages")}
    assert_refused(PREFILL, operands | narrow, f"{PREFILL}: page_len must be a multiple of 64")
