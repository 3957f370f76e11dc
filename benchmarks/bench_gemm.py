"""How long do a layer's two products take in W8A8, W8A16 and bf16 when there are many rows, and what stands in front?

Each line is one jitted loop over the weights of a few layers, more bytes than the L2 holds. Operations per second
stand beside a product, beside `quantize_rows` the share of the read bandwidth measured in the same run:

    python benchmarks/bench_gemm.py --json benchmarks/results/gemm_h100.json
    python benchmarks/bench_gemm.py --model demo --rows 100 --layers 2 --repeats 2

A call's scales (without scales, its bias) depend on the call before, and all results leave the loop: XLA can neither
take calls out of it nor leave out parts of them. That is one small kernel a call. `csrc/gemm_driver.cu` has the kernels
alone, tile by tile, beside CUTLASS's own.
"""

import argparse
import dataclasses
import pathlib
import statistics
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
from bench_generate import PRESETS, read_bandwidth
from bench_ops import make_weights, product_shape, random_array
from environment import environment, write_result

import custom_ops
from custom_ops import QuantizedArray
from custom_ops.timing import Step, compile_rotation, with_next
from kogpt_jax import runtime
from kogpt_jax.config import ModelConfig

ROWS = (512, 2040, 8192)
PRODUCTS = ("w_in", "w_out")


def make_step(kind: str, product: str, rows: int, config: ModelConfig) -> tuple[Step, str]:
    """(one call: a number from the call before, and a weight, to the next number and the results; which weights)."""
    implementation, _, op = kind.partition(" ")
    dtype, dim = config.jax_dtype, config.model_dim
    outputs, k_dim = product_shape(config, product)
    is_in = product == "w_in"
    bias = random_array(3, (config.ffn_dim if is_in else outputs,), dtype)
    behind: dict[str, Any] = {"bias": bias}
    if is_in:
        behind |= {"gelu_from": 3 * dim, "act_dim": dim + config.ffn_dim}
    else:
        behind["residual"] = random_array(5, (rows, dim), jnp.float32)
    x = random_array(4, (rows, k_dim), dtype)

    if op == "int8_gemm":
        quantized = custom_ops.quantize_rows(x, implementation="reference")

        def int8_gemm(before: jax.Array, weight: QuantizedArray) -> tuple[jax.Array, Any]:
            weight = QuantizedArray(weight.qvalue, weight.scale + before)
            return with_next(
                *custom_ops.int8_gemm(quantized, weight, dtype=dtype, implementation=implementation, **behind)
            )

        return int8_gemm, "int8"
    if op == "mixed_gemm":

        def mixed_gemm(before: jax.Array, weight: QuantizedArray) -> tuple[jax.Array, Any]:
            weight = QuantizedArray(weight.qvalue, weight.scale + before)
            return with_next(*custom_ops.mixed_gemm(x, weight, implementation=implementation, **behind))

        return mixed_gemm, "int8"
    if op == "linear":

        def linear(before: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
            options = behind | {"bias": bias + before.astype(dtype)}
            *results, _ = custom_ops.linear(x, weight, implementation=implementation, **options)
            return with_next(*results)

        return linear, "same"
    if op == "product":

        def plain(before: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
            return with_next(x.at[0, 0].add(before.astype(dtype)) @ weight.T)

        return plain, "same"
    if op == "quantize_rows":
        norm = (1 + random_array(1, (k_dim,), dtype, 0.1), random_array(2, (k_dim,), dtype, 0.1), 1e-5)
        multiplier = jnp.abs(random_array(6, (k_dim,), jnp.float32)) + 0.5
        source = x.astype(jnp.float32) if is_in else x

        def quantize_rows(before: jax.Array, _: Any) -> tuple[jax.Array, Any]:
            front: dict[str, Any] = {"k_multiplier": multiplier + before}
            if is_in:
                front = {"layer_norm": (norm[0] + before.astype(dtype), *norm[1:])}
            quantized = custom_ops.quantize_rows(source, implementation=implementation, **front)
            return with_next(quantized.scale, quantized.qvalue)

        return quantize_rows, "same"
    raise ValueError(kind)


KINDS = (
    "xla product",
    "ffi int8_gemm",
    "ffi mixed_gemm",
    "ffi quantize_rows",
    "reference linear",
    "reference int8_gemm",
    "reference quantize_rows",
)


def measure(kind: str, product: str, rows: int, config: ModelConfig, turns: int, repeats: int) -> dict[str, Any]:
    """Microseconds of a call: the median of ``repeats`` runs."""
    step, weight_kind = make_step(kind, product, rows, config)
    weights = make_weights(config, product, weight_kind, config.num_layers)

    sample = compile_rotation(step, weights, turns=turns).sample
    times = [sample() for _ in range(1 + repeats)]
    return {"us": statistics.median(times[1:]), "us_min": min(times[1:]), "us_max": max(times[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRESETS), default="kogpt-6b", help="whose layers' shapes")
    parser.add_argument("--layers", type=int, default=3, help="weights to rotate over")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=100.0, help="start no case after so many seconds")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here, after each case anew")
    arguments = parser.parse_args()

    started = time.perf_counter()
    jax.config.update("jax_enable_compilation_cache", False)
    runtime.configure()
    config = dataclasses.replace(PRESETS[arguments.model], dtype="bf16", num_layers=arguments.layers)
    bandwidth = read_bandwidth(2**26 if jax.default_backend() == "cpu" else 2**31)
    rows: list[dict[str, Any]] = []
    result = {
        "model": arguments.model,
        "layers": arguments.layers,
        "ceilings": {"read_bytes_per_s": bandwidth},
        "rows": rows,
        "environment": environment(),
    }
    print(f"{result['environment']['device']}: reads {bandwidth / 1e9:.0f} GB/s", flush=True)
    for num_rows in arguments.rows:
        for product in PRODUCTS:
            for kind in arguments.kind:
                row: dict[str, Any] = {"kind": kind, "product": product, "rows": num_rows}
                outputs, k_dim = product_shape(config, product)
                if time.perf_counter() - started > arguments.limit_s:
                    row["not_run"] = f"--limit-s {arguments.limit_s:g} was over"
                    rows.append(row)
                    write_result(arguments.json, result)
                    continue
                try:
                    row |= measure(kind, product, num_rows, config, arguments.turns, arguments.repeats)
                    if kind.endswith("quantize_rows"):
                        row["bytes"] = num_rows * k_dim * (5 if product == "w_in" else 3)
                        row["percent_of_limit"] = 1e8 * row["bytes"] / bandwidth / row["us"]
                    else:
                        row["tera_ops_per_s"] = 2e-6 * num_rows * outputs * k_dim / row["us"]
                except Exception as error:  # whatever it is, the other cases are wanted
                    traceback.print_exc()
                    row["error"] = f"{type(error).__name__}: {error}"[:2000]
                rows.append(row)
                print(line(row), flush=True)
                result["total_s"] = time.perf_counter() - started
                write_result(arguments.json, result)


def line(row: dict[str, Any]) -> str:
    head = f"{row['product']:6} rows {row['rows']:5}  {row['kind']:24}"
    if "us" not in row:
        return head + row["error"].splitlines()[-1][:100]
    rate = (
        f"{row['tera_ops_per_s']:7.0f} TOP/s"
        if "tera_ops_per_s" in row
        else f"{row['percent_of_limit']:5.1f} % of the read bandwidth"
    )
    return head + f"{row['us']:9.1f} us ({row['us_min']:.1f} to {row['us_max']:.1f}) {rate}"


if __name__ == "__main__":
    main()
