"""How long do prefill and a decode step take, next to the physical limit of the device?

Random weights at the KoGPT-6B shape, made on the device; prefill and decode apart; everything through the public API:

    python benchmarks/bench_generate.py --batch 1 8 32 64 --prompt-len 128 --json benchmarks/results/generate.json
    python benchmarks/bench_generate.py --quant w8a16 --batch 1 8 32 64

A decode step is (time of 73 new tokens - time of 9) / 64: whole chunks, prefill and the host's share per call
cancelled. Its limit is (weights but the embedding table, as they are stored, + keys and values read) / the read
bandwidth measured in the same run; that of prefill is (2 x weights of the layers x tokens + attention) / the measured
rate of a large product in the same dtype.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment, write_result
from rich import box
from rich.console import Console
from rich.table import Table

from kogpt_jax import DEMO, KOGPT_6B, KoGPT, SamplingParams, kv_cache
from kogpt_jax.config import DTYPES, QUANTS, Dtype, ModelConfig, Quant
from kogpt_jax.engine import STEPS_PER_CHUNK
from kogpt_jax.model import model_def
from kogpt_jax.ops import CHOICES, describe

# 355 million parameters: too many for a CPU's cache, few enough for a benchmark of minutes.
GPTJ_350M = ModelConfig(
    vocab_size=50400,
    max_len=2048,
    model_dim=1024,
    num_layers=20,
    num_heads=16,
    rotary_dim=64,
    ffn_dim=4096,
)
# Its heads and FFN units divide by 8, its vocabulary does not: for simulated devices.
TINY = ModelConfig(
    vocab_size=1003,
    max_len=512,
    model_dim=128,
    num_layers=3,
    num_heads=8,
    rotary_dim=16,
    ffn_dim=512,
)
PRESETS = {"kogpt-6b": KOGPT_6B, "gptj-350m": GPTJ_350M, "demo": DEMO, "tiny": TINY}
SAMPLING = {
    "greedy": SamplingParams(ignore_eos=True),
    "sampled": SamplingParams(ignore_eos=True, temperature=0.8, top_k=50, top_p=0.95, seed=0),
}
FEW_TOKENS = 1 + STEPS_PER_CHUNK
MANY_TOKENS = FEW_TOKENS + 8 * STEPS_PER_CHUNK


def median_s(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call that ends when its result is on the host or ready."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def read_bandwidth(num_bytes: int) -> float:
    """Bytes a second at which the device reads an array far larger than its caches, by summing it."""
    values = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    total = jax.jit(lambda values, offset: jnp.sum(values ^ offset))
    num_calls = 10

    def run() -> list[jax.Array]:
        return [total(values, np.uint32(call)) for call in range(num_calls)]

    return num_calls * values.nbytes / median_s(run, 5)


def matrix_rate(size: int, dtype: Dtype) -> float:
    """Operations a second of a square product in a dtype, on random data."""
    jax_dtype = dataclasses.replace(DEMO, dtype=dtype).jax_dtype
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.float32).astype(jax_dtype) for key in keys)
    precision = "highest" if dtype == "fp32" else "default"
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    num_calls = 10

    def run() -> list[jax.Array]:
        return [product(a, b) for _ in range(num_calls)]

    return num_calls * 2 * size**3 / median_s(run, 5)


def step_bytes(config: ModelConfig, batch: int, context: float) -> float:
    """Bytes a decode step must read: all matrices but the embedding table, and each row's keys and values."""
    layer = 4 * config.model_dim**2 + 2 * config.model_dim * config.ffn_dim
    weights = config.num_layers * layer + config.vocab_size * config.model_dim
    weight_bytes = weights * config.jax_dtype.itemsize
    if config.quant != "none":  # a byte each, and a scale an output of each product
        outputs = config.num_layers * (4 * config.model_dim + config.ffn_dim) + config.vocab_size
        weight_bytes = weights + 4 * outputs
    return weight_bytes + batch * context * kv_cache.cache_bytes_per_row(config, kv_cache.PAGE_LEN) / kv_cache.PAGE_LEN


def prefill_operations(config: ModelConfig, batch: int, prompt_len: int) -> float:
    """Operations of the layers' products and of causal attention; lm_head sees one token a row."""
    layer = 4 * config.model_dim**2 + 2 * config.model_dim * config.ffn_dim
    products = 2 * config.num_layers * layer * prompt_len + 2 * config.vocab_size * config.model_dim
    attention = 2 * config.num_layers * config.model_dim * prompt_len**2
    return batch * (products + attention)


def num_parameters(config: ModelConfig) -> int:
    """Without the scales of a quantised model."""
    return sum(math.prod(param.shape) for param in model_def(dataclasses.replace(config, quant="none")).params)


def prompts(config: ModelConfig, batch: int, prompt_len: int) -> list[list[int]]:
    tokens = np.random.default_rng(0).integers(5, config.vocab_size, (batch, prompt_len))
    # Ragged, as prompts are: row b is b mod 8 tokens shorter.
    return [row[: max(1, prompt_len - slot % 8)].tolist() for slot, row in enumerate(tokens)]


def measure(
    model: KoGPT,
    batch: int,
    prompt_len: int,
    sampling: str,
    repeats: int,
    call_tokens: int | None = None,
    pause_s: float = 0.0,
) -> dict[str, Any]:
    """Times one batch and prompt length, and with ``call_tokens`` whole calls of so many new tokens a row; each call
    after a pause."""
    config = model.config
    rows = prompts(config, batch, prompt_len)

    def generate(max_new_tokens: int) -> float:
        params = dataclasses.replace(SAMPLING[sampling], max_new_tokens=max_new_tokens)
        time.sleep(pause_s)
        begin = time.perf_counter()
        model.generate_ids(rows, params)
        return time.perf_counter() - begin

    lengths: tuple[int, ...] = (1, FEW_TOKENS, MANY_TOKENS)
    if prompt_len + MANY_TOKENS > config.max_len:  # prefill alone
        lengths = (1,)
    first_call_s = generate(lengths[-1])
    for length in lengths[:-1]:
        generate(length)
    # The lengths in turn, so that a drift of the clocks meets all of them.
    times = [[generate(length) for length in lengths] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    step_s = (medians[2] - medians[1]) / (MANY_TOKENS - FEW_TOKENS) if len(lengths) > 1 else math.nan
    capacity = model.cache_capacity([(prompt_len, lengths[-1])])
    whole_call = {}
    if call_tokens is not None:
        generate(call_tokens)
        call_s = statistics.median(generate(call_tokens) for _ in range(repeats))
        whole_call = {
            "call_new_tokens": call_tokens,
            "call_s": call_s,
            "call_tokens_per_s": batch * call_tokens / call_s,
        }
    return whole_call | {
        "batch": batch,
        "prompt_len": prompt_len,
        "capacity": capacity,
        "dtype": config.dtype,
        "quant": config.quant,
        "kv_dtype": config.kv_dtype,
        "sampling": sampling,
        "pause_s": pause_s,
        "prefill_ms": medians[0] * 1e3,
        "step_ms": _number(step_s * 1e3),
        "tokens_per_s": _number(batch / step_s),
        "first_call_s": first_call_s,
        "compile_s": first_call_s - medians[-1],
        "cache_bytes": batch * kv_cache.cache_bytes_per_row(config, capacity),
    }


def with_limits(row: dict[str, Any], config: ModelConfig, bandwidth: float, rate: float) -> dict[str, Any]:
    """A measured row with the physical limits beside it."""
    context = row["prompt_len"] + (FEW_TOKENS + MANY_TOKENS) / 2
    step_limit_ms = 1e3 * step_bytes(config, row["batch"], context) / bandwidth
    operations = prefill_operations(config, row["batch"], row["prompt_len"])
    return row | {
        "prefill_limit_ms": 1e3 * max(operations / rate, step_bytes(config, 0, 0) / bandwidth),
        "step_limit_ms": step_limit_ms,
        "step_percent_of_limit": None if row["step_ms"] is None else 100 * step_limit_ms / row["step_ms"],
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def memory(model: KoGPT, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Peak device memory so far, beside what the weights and the largest cache need."""
    stats = jax.devices()[0].memory_stats() or {}
    weight_bytes = sum(leaf.nbytes for leaf in model.leaves)
    return {
        "weight_bytes": weight_bytes,
        "largest_cache_bytes": max(row["cache_bytes"] for row in rows),
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
    }


def _step_columns(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['step_ms']:.3f}",
        f"{row['step_limit_ms']:.3f}",
        f"{row['step_percent_of_limit']:.0f}",
        f"{row['tokens_per_s']:.0f}",
    ]


def print_table(result: dict[str, Any]) -> None:
    ceilings = result["ceilings"]
    title = (
        f"{result['preset']} on {result['environment']['device']}: "
        f"reads {ceilings['read_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"multiplies {ceilings['operations_per_s'] / 1e12:.2f} TFLOP/s"
    )
    table = Table(title=title, box=box.SIMPLE)
    for column in (
        "dtype",
        "quant",
        "batch",
        "prompt",
        "tokens",
        "prefill ms",
        "limit",
        "step ms",
        "limit",
        "%",
        "tok/s",
        "compile s",
        "whole call, tok/s",
    ):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["dtype"],
            row["quant"],
            str(row["batch"]),
            str(row["prompt_len"]),
            row["sampling"],
            f"{row['prefill_ms']:.2f}",
            f"{row['prefill_limit_ms']:.2f}",
            *(["", "", "", ""] if row["step_ms"] is None else _step_columns(row)),
            f"{row['compile_s']:.1f}",
            f"{row['call_tokens_per_s']:.0f}" if "call_s" in row else "",
        )
    console = Console(width=160)
    console.print(table)
    used = result["memory"]
    if used["peak_bytes"] is not None:
        beyond = used["peak_bytes"] - used["weight_bytes"] - used["largest_cache_bytes"]
        console.print(
            f"memory: weights {used['weight_bytes'] / 1e9:.2f} GB, "
            f"largest cache {used['largest_cache_bytes'] / 1e9:.2f} GB, peak {used['peak_bytes'] / 1e9:.2f} GB: "
            f"{beyond / 1e9:.2f} GB beyond"
        )


def device_step_bytes(config: ModelConfig, extents: tuple[int, int, int], batch: int, context: float) -> float:
    """Bytes that the devices of one tensor shard read one after another for a token of each row.

    The stages of a pipeline hold a share of the weights each and read it for every microbatch; with as many of these as
    stages, all read at the same time, and a token of all rows takes what one stage reads for all microbatches.
    """
    data, pipe, tensor = extents
    weights = step_bytes(config, 0, 0)
    cache = step_bytes(config, -(-batch // data), context) - weights
    return weights / tensor + cache / (pipe * tensor)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which random model is measured."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="kogpt-6b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset, for a quick look")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quant", choices=QUANTS, default="none")
    parser.add_argument("--kv-dtype", choices=("int8",), help="of the cache; without it that of the activations")
    parser.add_argument("--implementation", choices=CHOICES, default="auto", help="what runs the ops")


def make_config(
    preset: str, num_layers: int | None, dtype: Dtype, quant: Quant, kv_dtype: str | None = None
) -> ModelConfig:
    """A preset in this precision, with as many layers as are asked for (None: its own) and no end-of-text token."""
    config = dataclasses.replace(PRESETS[preset], dtype=dtype, quant=quant, kv_dtype=kv_dtype, eos_token_ids=())
    return config if num_layers is None else dataclasses.replace(config, num_layers=num_layers)


def make_model(arguments: argparse.Namespace, max_batch_size: int, mesh: str = "d1p1t1") -> KoGPT:
    """The model that `add_model_arguments` asks for."""
    config = make_config(arguments.preset, arguments.layers, arguments.dtype, arguments.quant, arguments.kv_dtype)
    return KoGPT.from_random(config, mesh=mesh, max_batch_size=max_batch_size, implementation=arguments.implementation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-len", type=int, nargs="+", default=[128])
    parser.add_argument("--sampling", choices=sorted(SAMPLING), nargs="+", default=sorted(SAMPLING))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--call-tokens", type=int, help="also time whole calls of so many new tokens, prefill included")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds in front of each call: one after another they slow a hot GPU"
    )
    parser.add_argument(
        "--warm-cache", action="store_true", help="use the compilation cache; compile times then say so"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    arguments = parser.parse_args()

    if not arguments.warm_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    model = make_model(arguments, max(arguments.batch))
    config = model.config
    rows = [
        measure(model, batch, prompt_len, sampling, arguments.repeats, arguments.call_tokens, arguments.pause)
        for batch in arguments.batch
        for prompt_len in arguments.prompt_len
        for sampling in arguments.sampling
    ]
    used = memory(model, rows)  # before the ceilings are measured, which takes memory too
    on_cpu = jax.default_backend() == "cpu"
    bandwidth = read_bandwidth(2**28 if on_cpu else 2**32)
    rate = matrix_rate(1024 if on_cpu else 8192, config.dtype)
    result = {
        "preset": arguments.preset,
        "num_layers": config.num_layers,
        "parameters": num_parameters(config),
        "quant": config.quant,
        "ops": dataclasses.asdict(model.ops),
        "warm_cache": arguments.warm_cache,
        "ceilings": {"read_bytes_per_s": bandwidth, "operations_per_s": rate},
        "rows": [with_limits(row, config, bandwidth, rate) for row in rows],
        "memory": used,
        "environment": environment(),
    }
    print_table(result)
    print(describe(model.ops))
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
