"""`custom_ops.prefill_attention`: the reference against sums in f64, and what must not depend on anything. What holds
for the CUDA kernels is run by test_prefill_attention_on_gpu.py."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import prefill_attention_cases
import pytest
import tolerances
from prefill_attention_cases import PrefillAttentionCase, arguments_of, case_id, oracle_of

import custom_ops
from custom_ops import library_info, prefill_attention_ffi_problem

ALL_CASES = prefill_attention_cases.read_cases()
CASES = [case for case in ALL_CASES if case.dtype != "fp32"]
ALIASED = ("act", "k_pages", "v_pages")


def run(arguments, implementation: str, max_new: int | None = None):
    """(act, k_pages, v_pages) in f32, which is exact; what is aliased is given away."""
    arguments = dict(arguments)
    donated = {name: jax.tree.map(jnp.copy, arguments.pop(name)) for name in ALIASED}
    results = _call(donated, arguments, implementation=implementation, max_new=max_new)
    return jax.tree.map(in_f32, tuple(results[:3]))


def in_f32(array) -> np.ndarray:
    """NaNs of numpy's 16-bit types are not equal to themselves in its comparisons."""
    return np.asarray(array).astype(np.float32)


def _prefill_attention(donated, others, *, implementation, max_new):
    return custom_ops.prefill_attention(**donated, **others, implementation=implementation, max_new=max_new)


_call = jax.jit(_prefill_attention, static_argnames=("implementation", "max_new"), donate_argnums=0)


def by_head(case: PrefillAttentionCase, act) -> np.ndarray:
    """Of tokens of a row: [tokens, heads, head_dim]."""
    is_of_row = np.zeros(case.total_tokens, bool)
    for begin, num_new in zip(case.begins, case.num_new, strict=True):
        is_of_row[begin : begin + num_new] = True
    return np.asarray(act)[is_of_row, : case.width].reshape(-1, case.heads, case.head_dim)


def check_result(case: PrefillAttentionCase, arguments, results, oracle, errors, what: str) -> None:
    """The output within its tolerance, and beside it and the new tokens not a bit changed."""
    (act, k_pages, v_pages), (act_oracle, k_oracle, v_oracle) = results, oracle
    np.testing.assert_array_equal(np.isnan(act), np.isnan(act_oracle))
    if any(case.num_new):
        tolerances.assert_close(by_head(case, act), by_head(case, act_oracle), errors["out"], what)
    np.testing.assert_array_equal(v_pages[:-1], np.asarray(v_oracle, np.float32)[:-1])  # the last page is scratch
    np.testing.assert_array_equal(np.isnan(k_pages[:-1]), np.isnan(k_oracle[:-1]))
    is_token = ~np.isnan(k_oracle[:-1, 0, :, 0])
    if is_token.any():
        new, expected = (np.moveaxis(np.asarray(pages)[:-1], 1, 2)[is_token] for pages in (k_pages, k_oracle))
        tolerances.assert_close(new, expected, errors["k"], f"{what}: k")
    before = in_f32(arguments["k_pages"])[:-1]
    is_old = ~np.isnan(before)
    np.testing.assert_array_equal(k_pages[:-1][is_old], before[is_old])


@pytest.mark.parametrize("case", ALL_CASES, ids=case_id)
def test_reference_against_f64(case):
    arguments = arguments_of(case)
    module = tolerances.MODULE[case.dtype]
    if case.dtype == "fp32" and jax.default_backend() == "gpu":
        module = tolerances.ATTENTION_FP32_ON_GPU
    results = run(arguments, "reference", case.max_new or max(case.num_new))
    check_result(case, arguments, results, oracle_of(case, arguments), {"out": module, "k": module}, "reference")


SMALL = PrefillAttentionCase(
    total_tokens=70,
    heads=2,
    head_dim=64,
    page_len=64,
    max_pages=2,
    begins=(1, 40),
    num_new=(39, 29),
    lengths=(17, 40),
    rotary_dim=8,
)


def test_reference_in_blocks_of_queries_and_without_a_bound(monkeypatch):
    case = dataclasses.replace(SMALL, dtype="fp32")
    arguments = arguments_of(case)
    whole = run(arguments, "reference")
    # The package's name for the module is the op's.
    monkeypatch.setattr(sys.modules["custom_ops.prefill_attention"], "QUERY_BLOCK", 16)
    module = dict.fromkeys(("out", "k"), tolerances.MODULE["fp32"])
    oracle = oracle_of(case, arguments)
    check_result(case, arguments, whole, oracle, module, "whole")
    for max_new in (39, 40, 200):
        check_result(case, arguments, run(arguments, "reference", max_new), oracle, module, f"max_new {max_new}")


def test_a_prompt_in_chunks_is_the_whole_prompt():
    """Each chunk finds the ones before in the cache."""
    case = dataclasses.replace(SMALL, total_tokens=100, begins=(0,), num_new=(100,), lengths=(0,), dtype="fp32")
    arguments = arguments_of(case)
    act, k_pages, v_pages = run(arguments, "reference")
    pages = {name: arguments[name] for name in ("k_pages", "v_pages")}
    for begin, end in ((0, 33), (33, 64), (64, 65), (65, 100)):
        counts = {"begins": [begin], "num_new": [end - begin], "lengths": [begin]}
        chunk = arguments | pages | {name: jnp.asarray(value, jnp.int32) for name, value in counts.items()}
        of_chunk, *of_pages = run(chunk, "reference")
        tolerances.assert_close(of_chunk[begin:end], act[begin:end], tolerances.MODULE["fp32"])
        assert np.isnan(of_chunk[:begin]).all()
        assert np.isnan(of_chunk[end:]).all()
        pages = dict(zip(("k_pages", "v_pages"), map(jnp.asarray, of_pages), strict=True))
    np.testing.assert_array_equal(in_f32(pages["k_pages"])[:-1], k_pages[:-1])
    np.testing.assert_array_equal(in_f32(pages["v_pages"])[:-1], v_pages[:-1])


def check_that_more_columns_are_not_looked_at(implementation: str) -> None:
    arguments = arguments_of(SMALL)
    expected = run(arguments, implementation)
    for more in (8, 3):  # rows that begin at 16 bytes, and that do not
        qkv = jnp.pad(arguments["qkv"], ((0, 0), (0, more)), constant_values=jnp.nan)
        for result, as_before in zip(run(arguments | {"qkv": qkv}, implementation), expected, strict=True):
            np.testing.assert_array_equal(result, as_before)


def test_more_columns_of_qkv_are_not_looked_at():
    check_that_more_columns_are_not_looked_at("reference")


def test_no_rows_and_no_tokens_change_nothing():
    arguments = arguments_of(SMALL)
    empty = {name: arguments[name][:0] for name in ("page_table", "begins", "num_new", "lengths")}
    for changes in (empty, {name: arguments[name][:0] for name in ("qkv", "act")} | {"rotary": None}):
        changed = arguments | changes
        if changed["rotary"] is None:
            changed["rotary"] = tuple(table[:0] for table in arguments["rotary"])
        for result, name in zip(run(changed, "reference"), ALIASED, strict=True):
            np.testing.assert_array_equal(result, in_f32(changed[name]))


def test_semaphores_are_passed_through():
    semaphores = custom_ops.make_semaphores()
    results = custom_ops.prefill_attention(**arguments_of(SMALL), semaphores=semaphores, implementation="reference")
    assert results[3] is semaphores


# What follows takes the CUDA kernels: test_prefill_attention_on_gpu.py runs it.


def check_errors_of_the_kernels(case: PrefillAttentionCase) -> None:
    arguments = arguments_of(case)
    oracle = oracle_of(case, arguments)
    max_new = case.max_new or max(case.num_new)
    reference_error = 0.0
    if any(case.num_new):
        act = run(arguments, "reference", max_new)[0]
        reference_error = tolerances.relative_error(by_head(case, act), by_head(case, oracle[0]))
    errors = {
        "out": tolerances.twice_the_references_error(reference_error, case.dtype),
        "k": tolerances.twice_the_references_error(0.0, case.dtype),  # rounded once
    }
    results = run(arguments, "ffi", max_new)
    check_result(case, arguments, results, oracle, errors, "ffi")
    for again in (max_new, None):  # a looser bound lists more tiles, all of them empty
        jax.tree.map(np.testing.assert_array_equal, results, run(arguments, "ffi", again))


def check_that_a_row_is_the_same_bits_in_every_batch(head_dim: int, with_pages=lambda arguments: arguments) -> None:
    """Each row alone and in batches with other neighbours, packed in other places, and in a wider table."""
    rng = np.random.default_rng(2)
    num_new = tuple(int(count) for count in rng.integers(0, 300, 9))
    lengths = tuple(int(length) for length in rng.integers(0, 200, 9))
    begins = tuple(int(begin) for begin in np.concatenate([[0], np.cumsum(num_new)[:-1]]))
    case = PrefillAttentionCase(
        total_tokens=sum(num_new),
        heads=2,
        head_dim=head_dim,
        page_len=64,
        max_pages=8,
        begins=begins,
        num_new=num_new,
        lengths=lengths,
        rotary_dim=32,
    )
    arguments = with_pages(arguments_of(case))
    act = run(arguments, "ffi")[0]
    rows = [act[begin : begin + count] for begin, count in zip(begins, num_new, strict=True)]
    assert all(np.isfinite(row).all() for row in rows)
    chosen_rows = [[row] for row in range(9)] + [list(rng.permutation(9)[:size]) for size in (2, 5, 9)]
    for chosen in chosen_rows:
        counts = [num_new[row] for row in chosen]
        new_begins = 3 + np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
        tokens = np.full(sum(counts) + 5, case.total_tokens - 1)
        for row, begin in zip(chosen, new_begins, strict=True):
            tokens[begin : begin + num_new[row]] = np.arange(begins[row], begins[row] + num_new[row])
        index = jnp.asarray(chosen)
        part = arguments | {
            "qkv": arguments["qkv"][tokens],
            "rotary": tuple(table[tokens] for table in arguments["rotary"]),
            "act": jnp.full((len(tokens), case.width), jnp.nan, arguments["act"].dtype),
            "page_table": jnp.pad(arguments["page_table"][index], ((0, 0), (0, 3)), constant_values=2**30),
            "begins": jnp.asarray(new_begins, jnp.int32),
            "num_new": arguments["num_new"][index],
            "lengths": arguments["lengths"][index],
        }
        of_part = run(part, "ffi")[0]
        for row, begin in zip(chosen, new_begins, strict=True):
            np.testing.assert_array_equal(of_part[begin : begin + num_new[row]], rows[row])
        assert np.isnan(of_part[:3]).all()
        assert np.isnan(of_part[-2:]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": jnp.zeros((70, 380), jnp.bfloat16)}, r"qkv must have shape \(70, 384\), got \(70, 380\)"),
        ({"qkv": jnp.zeros((70, 384), jnp.float32)}, "qkv must be bfloat16, got float32"),
        ({"qkv": jnp.zeros((2, 35, 384), jnp.bfloat16)}, "qkv must have 2 axes"),
        ({"k_pages": jnp.zeros((5, 2, 64), jnp.bfloat16)}, "k_pages must have 4 axes"),
        ({"v_pages": jnp.zeros((5, 2, 32, 64), jnp.bfloat16)}, r"v_pages must have shape \(5, 2, 64, 64\)"),
        ({"v_pages": jnp.zeros((5, 2, 64, 64), jnp.float16)}, "v_pages must be bfloat16, got float16"),
        ({"page_table": jnp.zeros((2, 2), jnp.uint32)}, "page_table must be int32, got uint32"),
        ({"page_table": jnp.zeros(4, jnp.int32)}, "page_table must have 2 axes"),
        ({"begins": jnp.zeros(3, jnp.int32)}, r"begins must have shape \(2,\), got \(3,\)"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, r"lengths must have shape \(2,\), got \(3,\)"),
        ({"num_new": jnp.zeros((2, 1), jnp.int32)}, r"num_new must have shape \(2,\), got \(2, 1\)"),
        ({"num_new": jnp.zeros(2, bool)}, "num_new must be int32, got bool"),
        ({"act": jnp.zeros((70, 127), jnp.bfloat16)}, r"act must have shape \(70, 128 or more\), got \(70, 127\)"),
        ({"act": jnp.zeros((69, 128), jnp.bfloat16)}, r"act must have shape \(70, 128 or more\), got \(69, 128\)"),
        ({"act": jnp.zeros((70, 128), jnp.float32)}, "act must be bfloat16, got float32"),
        ({"rotary": (jnp.zeros((70, 33)), jnp.zeros((70, 33)))}, "at most head_dim = 64 values, got 66"),
        ({"rotary": (jnp.zeros((70, 4)), jnp.zeros((1, 4)))}, r"rotary\[1\] must have shape \(70, 4\), got \(1, 4\)"),
        ({"rotary": (jnp.zeros((70, 4)),) * 3}, r"rotary must be \(cos, sin\), got 3 arrays"),
        ({"max_new": -1}, "max_new must not be negative, got -1"),
        ({"implementation": "cudnn"}, "implementation must be 'reference' or 'ffi', got 'cudnn'"),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_arguments_that_do_not_fit_are_refused_by_name(changes, message, implementation):
    arguments = arguments_of(SMALL) | {"implementation": implementation} | changes
    with pytest.raises(ValueError, match=message):
        custom_ops.prefill_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 48}, r"head_dim must be in \(64, 128, 256\), got 48"),
        ({"page_len": 96}, "page_len must be a multiple of 64, got 96"),
        ({"dtype": "fp32"}, "dtype must be float16 or bfloat16 on gpu, got float32"),
    ],
)
def test_what_the_kernels_do_not_support_is_refused_by_name(changes, message):
    arguments = arguments_of(dataclasses.replace(SMALL, **changes))
    with pytest.raises(ValueError, match=message):
        custom_ops.prefill_attention(**arguments, implementation="ffi")


def test_too_many_rows_are_refused():
    arguments = arguments_of(SMALL)
    for name in ("page_table", "begins", "num_new", "lengths"):
        arguments[name] = jnp.repeat(arguments[name], 600, axis=0)
    with pytest.raises(ValueError, match="at most 1024 rows, got 1200"):
        custom_ops.prefill_attention(**arguments, implementation="ffi")


def test_why_the_kernels_cannot_serve():
    cache = {"dtype": jnp.bfloat16, "head_dim": 64, "page_len": 64}
    assert prefill_attention_ffi_problem(platform="cpu", **cache) == (
        "prefill_attention runs on NVIDIA GPUs only, not on cpu"
    )
    problem = next(library.problem for library in library_info() if library.name == "cuda")
    mine = prefill_attention_ffi_problem(platform="gpu", **cache)
    assert mine is None if problem is None else problem in str(mine)
    if problem is not None:
        with pytest.raises(ValueError, match="needs the CUDA library"):
            custom_ops.prefill_attention(**arguments_of(SMALL), implementation="ffi")
