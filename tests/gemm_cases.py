"""Test cases of `int8_gemm` and `mixed_gemm`: random data of a case, and what the ops should give in f64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from op_cases import DTYPES, heavy_tailed

import custom_ops
from custom_ops import QuantizedArray

OPS = ("int8_gemm", "mixed_gemm")


@dataclasses.dataclass(frozen=True)
class GemmCase:
    """Sizes, and which operands there are."""

    rows: int
    outputs: int
    k: int
    dtype: str = "bf16"
    y: str = "f32"
    bias: bool = False
    residual: bool = False
    gelu_from: int | None = None
    act_dim: int | None = None

    @property
    def num_gelu(self) -> int:
        return 0 if self.gelu_from is None else self.outputs - self.gelu_from


CASES = (
    # The smallest, and sizes that nothing divides.
    GemmCase(1, 1, 16, "fp16"),
    GemmCase(67, 99, 48, bias=True),
    GemmCase(130, 77, 112, "fp16", gelu_from=0, act_dim=99, bias=True),
    GemmCase(70, 130, 272, "fp16", y="fp16", gelu_from=65, act_dim=131, bias=True),
    # Even outputs, but no whole groups of eight.
    GemmCase(200, 298, 320, y="bf16", gelu_from=100, act_dim=200, bias=True),
    # A layer's two products, with a part of y and of act in one tile, around the borders of tiles.
    GemmCase(65, 304, 1040, y="bf16", gelu_from=104, act_dim=264, bias=True),
    GemmCase(128, 768, 528, "fp16", y="fp16", gelu_from=256, bias=True),
    GemmCase(1100, 384, 256, gelu_from=200, act_dim=200),
    GemmCase(333, 512, 1024, bias=True, residual=True),
    GemmCase(257, 520, 528, "fp16", residual=True),
    # A long K, and many rows.
    GemmCase(129, 264, 20480, bias=True, residual=True),
    GemmCase(4100, 136, 64, y="bf16"),
)


def gemm_arguments(op: str, case: GemmCase, seed: int = 0) -> dict[str, Any]:
    """Arguments of the op, implementation apart; arrays only where the case has them."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    x: Any = heavy_tailed(rng, case.rows, case.k, dtype=dtype)
    weight = heavy_tailed(rng, case.outputs, case.k, dtype=dtype, scale=case.k**-0.5)
    if op == "int8_gemm":
        x = custom_ops.quantize_rows(x, implementation="reference")
    arguments = {"x": x, "weight": custom_ops.quantize_weight(weight)}
    if case.bias:
        arguments["bias"] = heavy_tailed(rng, case.num_gelu or case.outputs, dtype=dtype, scale=0.3)
    if case.residual:
        arguments["residual"] = heavy_tailed(rng, case.rows, case.outputs - case.num_gelu, dtype=jnp.float32)
    return arguments


def call(op: str, case: GemmCase, arguments: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The op of such arguments."""
    arguments = dict(arguments)
    options = {"out_dtype": DTYPES[case.y], "gelu_from": case.gelu_from, "act_dim": case.act_dim} | options
    if op == "int8_gemm":
        options = {"dtype": DTYPES[case.dtype]} | options
    return getattr(custom_ops, op)(arguments.pop("x"), arguments.pop("weight"), **arguments, **options)


def outputs(case: GemmCase, y: Any, act: Any) -> dict[str, tuple[Any, str]]:
    """The results that a case has, GELU's without the columns in front, each with its dtype."""
    results = {}
    if case.gelu_from != 0:
        results["y"] = (y, "fp32" if case.y == "f32" else case.y)
    if case.num_gelu:
        results["act"] = (act[:, act.shape[1] - case.num_gelu :], case.dtype)
    return results


def oracle(case: GemmCase, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """y and GELU's outputs in f64; what is quantised is taken as it is."""
    values = {name: _as_f64(array) for name, array in arguments.items()}
    z = values["x"] @ values["weight"].T
    split = case.outputs - case.num_gelu
    y, gelu = z[:, :split], z[:, split:]
    bias = values.get("bias", 0.0)
    if case.gelu_from is None:
        return {"y": y + bias + values.get("residual", 0.0)}
    gelu = gelu + bias
    gelu = 0.5 * gelu * (1 + np.tanh(np.sqrt(2 / np.pi) * (gelu + 0.044715 * gelu**3)))
    return {"y": y + values.get("residual", 0.0), "act": gelu}


def rows_of(arguments: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The same call for some of the rows."""

    def chosen(name: str, array: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[rows], array) if name in ("x", "residual") else array

    return {name: chosen(name, array) for name, array in arguments.items()}


def poison(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the same shapes that make every result NaN; integers stay."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments)


def _as_f64(array: Any) -> np.ndarray:
    if isinstance(array, QuantizedArray):
        return np.asarray(array.qvalue, np.float64) * np.asarray(array.scale, np.float64)
    return np.asarray(array, np.float64)
