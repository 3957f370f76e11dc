"""`custom_ops.int8_gemm` and `mixed_gemm`: the references against sums in f64, and arguments that do not fit.
test_gemm_on_gpu.py has what the kernels must do."""

import dataclasses

import gemm_cases
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from gemm_cases import CASES, OPS, GemmCase, gemm_arguments
from op_cases import case_id

import custom_ops
from custom_ops import QuantizedArray, _library
from custom_ops._library import LibraryInfo

F32, BF16, FP16 = jnp.float32, jnp.bfloat16, jnp.float16
BASE = GemmCase(9, 24, 32, "bf16", y="bf16", bias=True, gelu_from=8, act_dim=20)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [*CASES, GemmCase(5, 9, 7, "fp32", bias=True)], ids=case_id)
def test_reference_against_f64(op, case):
    arguments = gemm_arguments(op, case)
    results = gemm_cases.call(op, case, arguments, implementation="reference")
    expected = gemm_cases.oracle(case, arguments)
    for name, (value, _) in gemm_cases.outputs(case, *results).items():
        tolerances.assert_close(value, expected[name], tolerances.MODULE[case.dtype], name)


@pytest.mark.parametrize("op", OPS)
def test_reference_zeros_what_is_attentions(op):
    y, act = gemm_cases.call(op, BASE, gemm_arguments(op, BASE), implementation="reference")
    assert (y.shape, act.shape) == ((9, 8), (9, 20))
    assert not np.any(act[:, :4])
    assert np.all(np.any(act[:, 4:], axis=1))


def test_int8_sums_are_exact():
    """In f32 they would not be: 127 * 127 * 4096 needs 26 bits."""
    x = QuantizedArray(jnp.full((2, 4096), 127, jnp.int8).at[1, 0].set(126), jnp.ones((2, 1)))
    weight = QuantizedArray(jnp.full((1, 4096), 127, jnp.int8), jnp.ones((1, 1)))
    y, _ = custom_ops.int8_gemm(x, weight, dtype=BF16, out_dtype=F32, implementation="reference")
    assert float(y[0, 0] - y[1, 0]) == 128  # 127, between numbers that f32 has 4 apart
    assert float(y[0, 0]) == np.float32(127 * 127 * 4096)


def test_mixed_gemm_is_linear():
    """The same op for other numbers of rows."""
    case = dataclasses.replace(BASE, rows=5)
    arguments = gemm_arguments("mixed_gemm", case)
    y, act = gemm_cases.call("mixed_gemm", case, arguments, implementation="reference")
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    options = {"bias": bias, "gelu_from": 8, "act_dim": 20, "implementation": "reference"}
    expected_y, expected_act, _ = custom_ops.linear(x, weight, **options)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(act, expected_act)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": QuantizedArray(jnp.ones((24, 48), jnp.int8), jnp.ones((24, 1)))}, r"K = 48, got \(9, 32\)"),
        ({"weight": QuantizedArray(jnp.ones((24, 32), jnp.int8), jnp.ones((24, 32)))}, r"must have shape \(24, 1\)"),
        ({"weight": QuantizedArray(jnp.ones((24, 32), F32), jnp.ones((24, 1)))}, "qvalue must be int8, got float32"),
        ({"bias": jnp.ones(24, BF16)}, r"bias must have shape \(16,\), got \(24,\)"),
        ({"bias": jnp.ones(16, F32)}, "bias must be bfloat16, got float32"),
        ({"residual": jnp.ones((9, 24))}, r"residual must have shape \(9, 8\), got \(9, 24\)"),
        ({"residual": jnp.ones((9, 8)), "out_dtype": BF16}, "out_dtype must be float32, got bfloat16"),
        ({"out_dtype": FP16}, "out_dtype must be bfloat16 or float32, got float16"),
        ({"gelu_from": 24}, r"gelu_from must be in \[0, 24\), the outputs of weight, got 24"),
        ({"act_dim": 15}, "act_dim must be at least 16, GELU's outputs, got 15"),
        ({"gelu_from": None, "bias": jnp.ones(24, BF16)}, "act_dim must be None without gelu_from, got 20"),
        ({"tile": 0}, 'tile must be None with implementation "reference", got 0'),
        ({"implementation": "auto"}, "implementation must be 'reference' or 'ffi', got 'auto'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(op, changes, message):
    arrays = {name: value for name, value in changes.items() if name in ("weight", "bias", "residual")}
    options = {name: value for name, value in changes.items() if name not in arrays}
    with pytest.raises(ValueError, match=message):
        gemm_cases.call(op, BASE, gemm_arguments(op, BASE) | arrays, **({"implementation": "reference"} | options))


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (QuantizedArray(jnp.ones((9, 32), jnp.int8), jnp.ones((1, 1))), BF16, r"x.scale must have shape \(9, 1\)"),
        (QuantizedArray(jnp.ones((9, 32), F32), jnp.ones((9, 1))), BF16, "x.qvalue must be int8, got float32"),
        (QuantizedArray(jnp.ones((9, 32), jnp.int8), jnp.ones((9, 1))), jnp.int8, "dtype must be float32 or float16"),
    ],
)
def test_activations_that_are_not_quantised_by_row_are_refused(x, dtype, message):
    weight = QuantizedArray(jnp.ones((24, 32), jnp.int8), jnp.ones((24, 1)))
    with pytest.raises(ValueError, match=message):
        custom_ops.int8_gemm(x, weight, dtype=dtype, implementation="reference")


def test_a_sum_that_might_not_fit_is_refused():
    wide = QuantizedArray(jnp.ones((1, 133152), jnp.int8), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="K must be at most 133144"):
        custom_ops.int8_gemm(wide, wide, dtype=BF16, implementation="reference")


@pytest.mark.parametrize("op", [*OPS, "quantize_rows"])
def test_there_is_no_kernel_for_cpus(op):
    problem = getattr(custom_ops, f"{op}_ffi_problem")(platform="cpu", dtype=BF16, k_dims=(64,))
    assert problem == "there is no kernel for cpu"


def test_a_library_without_cutlass_says_so(monkeypatch):
    library = LibraryInfo("cuda", problem=None, left_out=("kogpt_int8_gemm", "kogpt_mixed_gemm"))
    monkeypatch.setattr(_library, "load", lambda platform: library)
    expected = "it was built without kogpt_int8_gemm, kogpt_mixed_gemm, which take CUTLASS's headers"
    assert custom_ops.int8_gemm_ffi_problem(platform="gpu", dtype=jnp.bfloat16, k_dims=[64]) == expected
    with pytest.raises(ValueError, match="CUTLASS's headers"):
        custom_ops.quantize_rows(jnp.ones((2, 64)), implementation="ffi")
