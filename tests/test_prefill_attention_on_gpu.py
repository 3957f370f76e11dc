"""`custom_ops.prefill_attention` on the CUDA kernels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hlo import Module, num_elements
from prefill_attention_cases import arguments_of, case_id
from test_int8_cache import (
    check_errors_of_the_prefill_kernels,
    check_that_a_head_that_is_not_finite_shows,
    with_int8_pages,
)
from test_prefill_attention import (
    ALIASED,
    CASES,
    SMALL,
    check_errors_of_the_kernels,
    check_that_a_row_is_the_same_bits_in_every_batch,
    check_that_more_columns_are_not_looked_at,
    in_f32,
    run,
    test_arguments_that_do_not_fit_are_refused_by_name,
    test_reference_against_f64,
    test_too_many_rows_are_refused,
    test_what_the_kernels_do_not_support_is_refused_by_name,
    test_why_the_kernels_cannot_serve,
)

import custom_ops

__all__ = [
    "test_arguments_that_do_not_fit_are_refused_by_name",
    "test_reference_against_f64",
    "test_too_many_rows_are_refused",
    "test_what_the_kernels_do_not_support_is_refused_by_name",
    "test_why_the_kernels_cannot_serve",
]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_at_most_twice_the_references(case):
    check_errors_of_the_kernels(case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_over_int8_pages_is_at_most_twice_the_references(case):
    check_errors_of_the_prefill_kernels(case)


# What makes the pages of a call.
PAGES = pytest.mark.parametrize("with_pages", [dict, with_int8_pages], ids=["16 bits", "INT8"])


@PAGES
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_row_is_the_same_bits_in_every_batch(head_dim, with_pages):
    check_that_a_row_is_the_same_bits_in_every_batch(head_dim, with_pages)


def test_an_int8_head_that_is_not_finite_shows_and_one_of_zeros_does_not():
    check_that_a_head_that_is_not_finite_shows("ffi")


def test_more_columns_of_qkv_are_not_looked_at():
    check_that_more_columns_are_not_looked_at("ffi")


def test_no_rows_and_no_tokens_change_nothing():
    arguments = arguments_of(SMALL)
    without_rows = {name: arguments[name][:0] for name in ("page_table", "begins", "num_new", "lengths")}
    without_tokens = {name: arguments[name][:0] for name in ("qkv", "act")}
    without_tokens["rotary"] = tuple(table[:0] for table in arguments["rotary"])
    for changes in (without_rows, without_tokens):
        changed = arguments | changes
        for result, name in zip(run(changed, "ffi"), ALIASED, strict=True):
            np.testing.assert_array_equal(result, in_f32(changed[name]))


@PAGES
def test_prefill_and_decoding_share_the_cache(with_pages):
    """One more token by decode_attention is the same as one more in the prompt."""
    arguments = with_pages(arguments_of(SMALL))
    act, k_pages, v_pages = run(arguments, "ffi")
    one_less = arguments | {"num_new": arguments["num_new"] - 1}
    _, k_before, v_before, _ = custom_ops.prefill_attention(**one_less, implementation="ffi")
    last = arguments["begins"] + arguments["num_new"] - 1
    decoded, k_appended, v_appended, _ = custom_ops.decode_attention(
        arguments["qkv"][last],
        tuple(table[last] for table in arguments["rotary"]),
        k_before,
        v_before,
        arguments["page_table"],
        arguments["lengths"] + arguments["num_new"] - 1,
        jnp.ones(2, jnp.int32),
        arguments["act"][last],
        semaphores=custom_ops.make_semaphores(),
        implementation="ffi",
    )
    tolerances.assert_close(in_f32(decoded), act[np.asarray(last)], tolerances.MODULE["bf16"])
    for appended, pages in ((k_appended, k_pages), (v_appended, v_pages)):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(in_f32, appended), pages)


@PAGES
def test_cache_and_result_are_updated_in_place(with_pages):
    """In a loop, too: no array of the size of the cache is made in its body."""
    arguments = with_pages(arguments_of(SMALL))
    donated = {name: arguments.pop(name) for name in ALIASED}

    @functools.partial(jax.jit, donate_argnums=0)
    def chunks(donated, others):
        def chunk(_, carry):
            donated, lengths = carry
            *results, _ = custom_ops.prefill_attention(
                **donated, **(others | {"lengths": lengths}), implementation="ffi"
            )
            return dict(zip(ALIASED, results, strict=True)), lengths + 1

        return jax.lax.fori_loop(0, 3, chunk, (donated, others["lengths"]))

    compiled = chunks.lower(donated, arguments).compile()
    text = compiled.as_text()
    assert text is not None
    call = next(line for line in text.splitlines() if 'custom_call_target="kogpt_prefill_attention"' in line)
    scales = ((2, 4), (4, 6)) if with_pages is with_int8_pages else ()
    for result, argument in ((0, 11), (1, 3), (3, 5), *scales):
        assert f"{{{result}}}: ({argument}, {{}})" in call
    size = math.prod(donated["k_pages"].shape)
    copies = [
        instruction
        for instruction in Module.parse(text).running()
        if instruction.opcode.startswith("copy") and num_elements(instruction.result) >= size
    ]
    assert not copies
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in jax.tree.leaves(donated))


def test_vmap_raises():
    arguments = arguments_of(SMALL)
    qkv = jnp.stack([arguments.pop("qkv")] * 2)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda qkv: custom_ops.prefill_attention(qkv, **arguments, implementation="ffi"))(qkv)


def test_inside_shard_map_nothing_is_gathered():
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    arguments = arguments_of(SMALL)
    heads = jax.sharding.PartitionSpec(None, "tensor")
    sharded_names = ("qkv", "k_pages", "v_pages", "act")
    others = {name: value for name, value in arguments.items() if name not in sharded_names}

    def local(*arrays):
        named = dict(zip(sharded_names, arrays, strict=True))
        return custom_ops.prefill_attention(**named, **others, implementation="ffi")[:3]

    call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(heads,) * 4, out_specs=(heads,) * 3, check_vma=False))
    arrays = tuple(arguments[name] for name in sharded_names)
    text = call.lower(*arrays).compile().as_text()
    assert text is not None
    assert "all-gather" not in text
    jax.tree.map(np.testing.assert_array_equal, tuple(map(in_f32, call(*arrays))), run(arguments, "ffi"))
