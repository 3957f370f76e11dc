"""How long does an op take beside XLA's own and cuDNN's, and how near does it come to reading its operands once?

Each case is one jitted function: a loop of known trip count over the weights or caches of many layers, more bytes than
the L2 holds, so that each call finds its own in device memory. A call's limit is (the weight's bytes as it is stored,
or those of the keys and values) / the read bandwidth measured in the same run:

    python benchmarks/bench_ops.py --json benchmarks/results/ops_h100.json
    python benchmarks/bench_ops.py --model demo --rows 1 8 --context 100 --layers 3 --repeats 3

Calls follow one another: "ffi" hands the semaphores on, which makes XLA keep every call and run them in order, and has
no operation between two calls. "reference" has none that would do so; its result goes, scaled down, into the next
call's input, in what XLA fuses with the LayerNorm or the rotary embedding there. cuDNN's output is the next query.
A case that fails, or that --limit-s leaves no time for, is in the JSON with the reason.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from bench_generate import PRESETS, read_bandwidth
from environment import environment, write_result

import custom_ops
from custom_ops import QuantizedArray
from kogpt_jax import runtime
from kogpt_jax.config import DTYPES, ModelConfig
from kogpt_jax.decoding import WITHOUT_CUDA_GRAPHS
from kogpt_jax.kv_cache import PAGE_LEN, pages_per_row

OPS = ("decode_attention", "linear")
WEIGHTS = ("same", "int8")
PRODUCTS = ("w_in", "w_out", "lm_head")
CUDNN = "cudnn, contiguous K/V, no rotary, no append"
# (batch, context): what a step at batch 1 sees, and caches of more than 64 MB.
ATTENTION_SHAPES = ((1, 256), (64, 256), (8, 1024), (8, 2040), (64, 1024), (1, 2040))
ROWS = (1, 8, 32, 64)
# XLA unrolls and compiles each layer: as few as read this much, several times an H100's L2 of 50 MB.
ENOUGH_BYTES = 2**28
# A run lasts about so long at the limit: a hundred times what the host takes to start it.
RUN_S = {"cpu": 0.02, "gpu": 0.03}
LIMIT_PER_CALL_S = 5e-6  # no call of a few kernels is faster than this, whatever it reads
SMALL = 1e-3  # of a result that goes into the next input

State = Any
Step = Callable[[State, Any], State]  # one call: what goes on to the next one, and the layer's weights or cache


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    op: str
    implementation: str
    shape: str  # "w_in" or "context 256"
    rows: int
    weight: str
    read_bytes: int  # by a call
    context: int = 0
    num_layers: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """What a case runs: ``step`` over ``layers``, in turn."""

    step: Step
    state: State
    layers: tuple[Any, ...]
    updates_layers: bool  # the layers are caches: ``step`` returns (state, layer), and both are donated


def random_array(seed: int, shape: Sequence[int], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normal values made on the device; of int8 all from -127 to 127."""
    return _random_array(jax.random.key(seed), tuple(shape), jnp.dtype(dtype), scale)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    if dtype == jnp.int8:
        bits = jax.random.bits(key, shape, jnp.uint8)
        return jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.int8), -127)
    return (scale * jax.random.normal(key, shape, dtype)).astype(dtype)


def product_shape(config: ModelConfig, product: str) -> tuple[int, int]:
    """(outputs, K) of a product of a decode step."""
    dim, ffn_dim = config.model_dim, config.ffn_dim
    return {"w_in": (3 * dim + ffn_dim, dim), "w_out": (dim, dim + ffn_dim), "lm_head": (config.vocab_size, dim)}[
        product
    ]


@functools.lru_cache(maxsize=1)  # for all rows; the weights before are freed
def make_weights(config: ModelConfig, product: str, weight: str, num_layers: int) -> tuple[Any, ...]:
    outputs, k_dim = product_shape(config, product)

    def one(seed: int) -> Any:
        if weight == "same":
            return random_array(seed, (outputs, k_dim), config.jax_dtype, k_dim**-0.5)
        qvalue = random_array(seed, (outputs, k_dim), jnp.int8)
        scale = jnp.abs(random_array(seed + 1000, (outputs, 1), jnp.float32, k_dim**-0.5 / 73)) + 1e-6
        return QuantizedArray(qvalue, scale)

    return tuple(one(seed) for seed in range(num_layers))


def linear_program(case: Case, config: ModelConfig) -> Program:
    """The product as a decode step calls it (kogpt_jax/model.py)."""
    dtype, dim = config.jax_dtype, config.model_dim
    outputs, k_dim = product_shape(config, case.shape)
    weights = make_weights(config, case.shape, case.weight, case.num_layers)
    norm = (1 + random_array(1, (k_dim,), dtype, 0.1), random_array(2, (k_dim,), dtype, 0.1), 1e-5)
    options: dict[str, Any]
    if case.shape == "w_in":
        bias = random_array(3, (config.ffn_dim,), dtype)
        options = {"layer_norm": norm, "bias": bias, "gelu_from": 3 * dim, "act_dim": dim + config.ffn_dim}
    elif case.shape == "lm_head":
        options = {"layer_norm": norm, "bias": random_array(3, (outputs,), dtype), "out_dtype": jnp.float32}
    else:
        options = {"bias": random_array(3, (outputs,), dtype)}
    x = random_array(4, (case.rows, k_dim), dtype if case.shape == "w_out" else jnp.float32)
    residual = random_array(5, (case.rows, dim), jnp.float32)

    def step(state: State, weight: Any) -> State:
        x, residual, semaphores = state
        if case.shape == "w_out":
            options["residual"] = residual
        *results, semaphores = custom_ops.linear(
            x, weight, semaphores=semaphores, prefetch_weight=True, implementation=case.implementation, **options
        )
        if case.implementation == "reference":
            if case.shape == "w_out":
                residual = results[0]  # all of it goes on; of x a factor depends on it
                x = (x * (1 + SMALL * jnp.tanh(residual[:, :1]))).astype(x.dtype)
            else:
                used = [result.astype(jnp.float32) for result in results]
                x = x + SMALL * jnp.tanh(_folded(jnp.concatenate(used, axis=1), k_dim))
        return x, residual, semaphores

    return Program(step, (x, residual, custom_ops.make_semaphores()), weights, updates_layers=False)


def _folded(y: jax.Array, width: int) -> jax.Array:
    """The maximum over pieces of ``width`` columns: all of y is used, in what XLA fuses with its reader."""
    pieces = [y[:, first : first + width] for first in range(0, y.shape[1], width)]
    pieces[-1] = jnp.pad(pieces[-1], ((0, 0), (0, width - pieces[-1].shape[1])))
    return functools.reduce(jnp.maximum, pieces)


def attention_program(case: Case, config: ModelConfig) -> Program:
    """Each row appends token ``context - 1``, at the same place in each turn, and attends to ``context`` of them."""
    dtype, width, batch = config.jax_dtype, config.num_heads * config.head_dim, case.rows
    max_pages = pages_per_row(case.context)
    shape = (batch * max_pages + 1, config.num_heads, PAGE_LEN, config.head_dim)
    layers = tuple(
        (random_array(2 * layer, shape, dtype), random_array(2 * layer + 1, shape, dtype))
        for layer in range(case.num_layers)
    )
    angles = case.context * 10000.0 ** -(jnp.arange(config.rotary_dim // 2) / (config.rotary_dim // 2))
    angles = jnp.broadcast_to(angles.astype(jnp.float32), (batch, angles.size))
    rotary = (jnp.cos(angles), jnp.sin(angles))
    page_table = jax.random.permutation(jax.random.key(1), batch * max_pages).astype(jnp.int32)
    page_table = page_table.reshape(batch, max_pages)
    state = (
        random_array(3, (batch, 3 * width), dtype),
        random_array(4, (batch, width + config.ffn_dim), dtype),
        custom_ops.make_semaphores(),
        (rotary, page_table, jnp.full(batch, case.context - 1, jnp.int32), jnp.ones(batch, jnp.int32)),
    )

    def step(state: State, pages: tuple[jax.Array, jax.Array]) -> State:
        qkv, act, semaphores, given = state
        rotary, page_table, lengths, num_new = given
        act, k_pages, v_pages, semaphores = custom_ops.decode_attention(
            qkv,
            rotary,
            *pages,
            page_table,
            lengths,
            num_new,
            act,
            semaphores=semaphores,
            prefetch_cache=True,
            implementation=case.implementation,
        )
        if case.implementation == "reference":
            qkv = jnp.concatenate([act[:, :width], qkv[:, width:]], axis=1)
        return (qkv, act, semaphores, given), (k_pages, v_pages)

    return Program(step, state, layers, updates_layers=True)


def cudnn_program(case: Case, config: ModelConfig) -> Program:
    """cuDNN's attention of one query over keys and values that lie in one piece."""
    dtype = config.jax_dtype
    shape = (case.rows, case.context, config.num_heads, config.head_dim)
    layers = tuple(
        (random_array(2 * layer, shape, dtype), random_array(2 * layer + 1, shape, dtype))
        for layer in range(case.num_layers)
    )
    q = random_array(3, (case.rows, 1, config.num_heads, config.head_dim), dtype)

    def step(q: State, layer: Any) -> State:
        return jax.nn.dot_product_attention(q, *layer, implementation="cudnn")

    return Program(step, q, layers, updates_layers=False)


def with_layers(case: Case, wanted: int) -> Case:
    """Rotating over as many layers as wanted, or as few as are enough where each costs seconds of compilation, or where
    a model has one; never over more than fit into memory."""
    if case.implementation == "reference" or case.shape == "lm_head":
        wanted = min(wanted, max(2, -(-ENOUGH_BYTES // case.read_bytes)))
    stats = jax.devices()[0].memory_stats() or {}
    room = 0.55 * stats.get("bytes_limit", 2**33)
    return dataclasses.replace(case, num_layers=max(1, min(wanted, int(room / case.read_bytes))))


def make_cases(arguments: argparse.Namespace, config: ModelConfig) -> list[Case]:
    """The project's kernels first, so that --limit-s takes what they are compared with."""
    itemsize = config.jax_dtype.itemsize
    shapes: Iterable[tuple[int, int]] = ATTENTION_SHAPES
    if arguments.rows or arguments.context:
        contexts = arguments.context or sorted({context for _, context in ATTENTION_SHAPES})
        shapes = [(rows, context) for context in contexts for rows in arguments.rows or ROWS]
    cases = []
    for implementation in ("ffi", CUDNN, "reference"):
        if "decode_attention" in arguments.op and (implementation != CUDNN or jax.default_backend() == "gpu"):
            for batch, context in shapes:
                read = 2 * batch * context * config.num_heads * config.head_dim * itemsize
                case = Case("decode_attention", implementation, f"context {context}", batch, "-", read, context)
                cases.append(with_layers(case, config.num_layers))
        if "linear" not in arguments.op or implementation == CUDNN:
            continue
        for weight in arguments.weight:
            for product in PRODUCTS:
                outputs, k_dim = product_shape(config, product)
                read = outputs * k_dim * itemsize if weight == "same" else outputs * (k_dim + 4)
                for rows in arguments.rows or ROWS:
                    case = Case("linear", implementation, product, rows, weight, read)
                    cases.append(with_layers(case, config.num_layers))
    return cases


def compiled_loop(program: Program, turns: int) -> Any:
    """``turns`` times over all layers, as one executable."""

    def run(state: State, layers: tuple[Any, ...]) -> tuple[State, tuple[Any, ...]]:
        def turn(_: Any, carry: tuple[State, tuple[Any, ...]]) -> tuple[State, tuple[Any, ...]]:
            state, updated = carry
            if not program.updates_layers:
                for layer in layers:
                    state = program.step(state, layer)
                return state, ()
            new = []
            for layer in updated:
                state, layer = program.step(state, layer)
                new.append(layer)
            return state, tuple(new)

        return jax.lax.fori_loop(0, turns, turn, (state, layers if program.updates_layers else ()))

    donated = ("layers",) if program.updates_layers else ()
    function = jax.jit(run, donate_argnames=donated, compiler_options=WITHOUT_CUDA_GRAPHS)  # as the decode loop
    return function.lower(program.state, program.layers).compile()


def measure(case: Case, config: ModelConfig, bandwidth: float, repeats: int) -> dict[str, Any]:
    """Times one case."""
    begin = time.perf_counter()
    make = linear_program if case.op == "linear" else attention_program
    program = (cudnn_program if case.implementation == CUDNN else make)(case, config)
    jax.block_until_ready((program.state, program.layers))
    make_s = time.perf_counter() - begin

    limit_s = case.read_bytes / bandwidth
    turn_s = case.num_layers * max(limit_s, LIMIT_PER_CALL_S)
    turns = max(2, round(RUN_S.get(jax.default_backend(), 0.02) / turn_s))
    begin = time.perf_counter()
    run = compiled_loop(program, turns)
    compile_s = time.perf_counter() - begin

    state, layers = program.state, program.layers
    del program  # or donated caches would be copied
    times = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        new_state, new_layers = jax.block_until_ready(run(state, layers))
        times.append(time.perf_counter() - begin)
        layers = new_layers or layers
        del new_state, new_layers
    num_calls = turns * case.num_layers
    temp_bytes = _temp_bytes(run)
    calls_us = [1e6 * seconds / num_calls for seconds in times[1:]]
    us = statistics.median(calls_us)
    return {
        "us": us,
        "us_min": min(calls_us),
        "us_max": max(calls_us),
        "gb_per_s": case.read_bytes / us / 1e3,
        "limit_us": 1e6 * limit_s,
        "percent_of_limit": 100 * 1e6 * limit_s / us,
        "turns": turns,
        "rotated_bytes": case.num_layers * case.read_bytes,
        "make_s": make_s,
        "compile_s": compile_s,
        "temp_bytes": temp_bytes,
        # Then XLA has copied caches, or taken conversions of all weights out of the loop.
        "has_copies_of_the_layers": temp_bytes is not None and 2 * temp_bytes > case.num_layers * case.read_bytes,
    }


def _temp_bytes(compiled: Any) -> int | None:
    """What the program takes beside arguments and results: as much as a cache where one is copied."""
    try:
        return int(compiled.memory_analysis().temp_size_in_bytes)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None


def line(row: dict[str, Any]) -> str:
    head = (
        f"{row['op']:16} {row['shape']:12} rows {row['rows']:2}  {row['weight']:4}  {row['implementation'][:9]:9} "
        f"{row['num_layers']:2} layers  "
    )
    if "us" not in row:
        return head + (row.get("error") or row["not_run"]).splitlines()[-1][:100]
    copies = "  copies" if row["has_copies_of_the_layers"] else ""
    return head + (
        f"{row['us']:9.2f} us ({row['us_min']:.2f} to {row['us_max']:.2f})  {row['gb_per_s']:7.1f} GB/s  "
        f"limit {row['limit_us']:8.2f} us  {row['percent_of_limit']:5.1f} %{copies}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--model", choices=sorted(PRESETS), default="kogpt-6b", help="whose layers' shapes")
    parser.add_argument("--layers", type=int, help="weights or caches to rotate over, the model's layers by default")
    parser.add_argument("--rows", type=int, nargs="+", help=f"{ROWS} by default, of attention {ATTENTION_SHAPES}")
    parser.add_argument("--context", type=int, nargs="+", help="keys of a row, the new one included")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--weight", choices=WEIGHTS, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit-s", type=float, default=110.0, help="start no case after so many seconds")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here, after each case anew")
    arguments = parser.parse_args()

    started = time.perf_counter()
    jax.config.update("jax_enable_compilation_cache", False)
    runtime.configure()
    config = dataclasses.replace(PRESETS[arguments.model], dtype=arguments.dtype)
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    bandwidth = read_bandwidth(2**28 if jax.default_backend() == "cpu" else 2**32)
    rows: list[dict[str, Any]] = []
    result = {
        "model": arguments.model,
        "dtype": config.dtype,
        "repeats": arguments.repeats,
        "ceilings": {"read_bytes_per_s": bandwidth},
        "libraries": str(custom_ops.library_info()),
        "rows": rows,
        "environment": environment(),
    }
    print(f"{result['environment']['device']}: reads {bandwidth / 1e9:.0f} GB/s", flush=True)
    for case in make_cases(arguments, config):
        row = dataclasses.asdict(case)
        spent_s = time.perf_counter() - started
        if spent_s > arguments.limit_s:
            row["not_run"] = f"--limit-s {arguments.limit_s:g} was over after {spent_s:.0f} s"
        else:
            try:
                row |= measure(case, config, bandwidth, arguments.repeats)
            except Exception as error:  # whatever it is, the other cases are wanted
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
        rows.append(row)
        print(line(row), flush=True)
        result["total_s"] = time.perf_counter() - started
        write_result(arguments.json, result)


if __name__ == "__main__":
    main()
