"""`custom_ops.quantize_rows`: against f64, and rows that are not as others. test_quantize_rows_on_gpu.py runs the same
functions on the kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_cases import DTYPES, EPSILON, heavy_tailed

import custom_ops

SHAPES = ((1, 16), (7, 1040), (65, 4096), (3, 20480), (2, 20496))


def make_arguments(rows, k_dim, dtype, has_layer_norm, has_multiplier):
    rng = np.random.default_rng(k_dim)
    arguments: dict[str, Any] = {"x": heavy_tailed(rng, rows, k_dim, dtype=dtype) + jnp.asarray(0.5, dtype)}
    if has_layer_norm:
        ln_dtype = jnp.bfloat16 if dtype == jnp.float32 else dtype
        scale = 1 + heavy_tailed(rng, k_dim, dtype=ln_dtype, scale=0.1)
        arguments["layer_norm"] = (scale, heavy_tailed(rng, k_dim, dtype=ln_dtype, scale=0.1), EPSILON)
    if has_multiplier:
        arguments["k_multiplier"] = jnp.exp(heavy_tailed(rng, k_dim, dtype=jnp.float32, scale=0.2))
    return arguments


def implementation():
    """The kernel where there is one."""
    return "reference" if jax.default_backend() == "cpu" else "ffi"


def quantize(arguments):
    def run(x, norm, multiplier):
        layer_norm = None if norm is None else (*norm, EPSILON)
        return custom_ops.quantize_rows(
            x, layer_norm=layer_norm, k_multiplier=multiplier, implementation=implementation()
        )

    norm = arguments["layer_norm"][:2] if "layer_norm" in arguments else None
    return jax.jit(run)(arguments["x"], norm, arguments.get("k_multiplier"))


def prepared(arguments):
    """What is rounded, in f64."""
    h = np.asarray(arguments["x"], np.float64)
    if "layer_norm" in arguments:
        scale, bias, epsilon = (np.asarray(part, np.float64) for part in arguments["layer_norm"])
        h = h - h.mean(axis=-1, keepdims=True)
        h = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias
    return h * np.asarray(arguments.get("k_multiplier", 1.0), np.float64)


@pytest.mark.parametrize("has_multiplier", [False, True])
@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("rows", "k_dim"), SHAPES)
def test_against_f64(rows, k_dim, dtype, has_layer_norm, has_multiplier):
    arguments = make_arguments(rows, k_dim, DTYPES[dtype], has_layer_norm, has_multiplier)
    quantized = quantize(arguments)
    assert (quantized.qvalue.dtype, quantized.scale.shape) == (jnp.int8, (rows, 1))
    h, scale = prepared(arguments), np.asarray(quantized.scale, np.float64)
    np.testing.assert_allclose(scale[:, 0], np.abs(h).max(axis=1) / 127, rtol=2e-6)
    # A sum in f32 may tip a value that lies half-way.
    assert np.all(np.abs(np.asarray(quantized.qvalue) - h / scale) <= 0.501)
    assert np.all(np.abs(np.asarray(quantized.qvalue, np.int32)).max(axis=1) == 127)
    again = quantize(arguments)
    np.testing.assert_array_equal(quantized.qvalue, again.qvalue)
    np.testing.assert_array_equal(quantized.scale, again.scale)


def test_a_row_without_layer_norm_is_quantised_as_a_weight_is():
    """To the last bit: neither has a sum in it."""
    x = heavy_tailed(np.random.default_rng(0), 9, 4096, dtype=jnp.float32)
    x = x.at[2].multiply(1e-30).at[3].multiply(1e30)
    expected = jax.jit(custom_ops.quantize_weight)(x)
    quantized = quantize({"x": x})
    np.testing.assert_array_equal(quantized.scale, expected.scale)
    np.testing.assert_array_equal(quantized.qvalue, expected.qvalue)


def test_halves_round_to_even():
    row = jnp.asarray([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, *range(8)])
    quantized = quantize({"x": row[None]})
    assert quantized.qvalue[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, *range(8)]
    assert float(quantized.scale[0, 0]) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize("k_dim", [48, 20496])
def test_rows_of_zeros_and_rows_that_are_not_finite(k_dim, has_layer_norm, value):
    arguments = make_arguments(6, k_dim, jnp.bfloat16, has_layer_norm, has_multiplier=True)
    clean = quantize(arguments)
    x = arguments["x"].at[2, k_dim - 1].set(value).at[4].set(0)
    quantized = quantize(arguments | {"x": x})
    assert not np.isfinite(quantized.scale[2, 0])
    if not has_layer_norm:
        assert float(quantized.scale[4, 0]) == 1
        assert not np.any(quantized.qvalue[4])
    for row in (0, 1, 3, 5):
        np.testing.assert_array_equal(quantized.qvalue[row], clean.qvalue[row])
        np.testing.assert_array_equal(quantized.scale[row], clean.scale[row])


def test_a_row_is_the_same_bits_in_every_batch():
    arguments = make_arguments(300, 1040, jnp.float32, has_layer_norm=True, has_multiplier=True)
    whole = quantize(arguments)
    for rows in ([5], [299, 7, 120]):
        part = quantize(arguments | {"x": arguments["x"][np.asarray(rows)]})
        if implementation() == "ffi":
            np.testing.assert_array_equal(part.scale, whole.scale[np.asarray(rows)])
            np.testing.assert_array_equal(part.qvalue, whole.qvalue[np.asarray(rows)])
        else:
            np.testing.assert_allclose(part.scale, whole.scale[np.asarray(rows)], rtol=2e-6)


ROW_NORM = (jnp.ones(32, jnp.bfloat16), jnp.ones(32, jnp.bfloat16), EPSILON)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones(32)}, r"x must have 2 axes, got shape \(32,\)"),
        ({"x": jnp.ones((4, 32), jnp.int8)}, "x must be float32 or float16 or bfloat16, got int8"),
        ({"layer_norm": (ROW_NORM[0][1:], *ROW_NORM[1:])}, r"layer_norm.scale must have shape \(32,\), got \(31,\)"),
        ({"layer_norm": (ROW_NORM[0], jnp.ones(32), EPSILON)}, "layer_norm.bias must be bfloat16, got float32"),
        ({"k_multiplier": jnp.ones(31)}, r"k_multiplier must have shape \(32,\), got \(31,\)"),
        ({"k_multiplier": jnp.ones(32, jnp.bfloat16)}, "k_multiplier must be float32, got bfloat16"),
        ({"implementation": "auto"}, "implementation must be 'reference' or 'ffi', got 'auto'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes, message):
    arguments = {"x": jnp.ones((4, 32)), "layer_norm": ROW_NORM, "implementation": implementation()} | changes
    with pytest.raises(ValueError, match=message):
        custom_ops.quantize_rows(arguments.pop("x"), **arguments)
