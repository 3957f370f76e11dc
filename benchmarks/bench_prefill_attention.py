"""How long does prefill_attention take beside cuDNN's attention with what it lacks added in XLA, and how near does it
come to the matrix rate?

Each case is one jitted function: a loop of known trip count over the caches and q, k, v of several layers, more bytes
than the L2 holds. One row of so many new tokens and an empty cache:

    python benchmarks/bench_prefill_attention.py --json benchmarks/results/prefill_attention_h100.json

The rivals: cuDNN's attention (`jax.nn.dot_product_attention`) on q and k that XLA rotates, with k and v written to a
contiguous cache, [B, max_len, N, H], or to the pages that the op has; and cuDNN's attention alone, which does less.
The matrix rate is that of an 8192^3 product in the same run; operations are those of causal attention, 4 N H T^2 / 2.
Every case has one tiny kernel more, which takes a value of each call's result into the next call's query.
"""

import argparse
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from bench_generate import matrix_rate
from environment import environment, write_result

import custom_ops
from custom_ops import pages as kv_pages
from custom_ops.rotary import apply_rotary

TOKENS = (512, 1024, 2048)
NUM_LAYERS = 4
PAGE_LEN = 64
RUN_S = 0.02  # a run at the limit: a hundred times what the host takes to start it
CUDNN_CONTIGUOUS, CUDNN_PAGED, CUDNN_ALONE = (
    "cudnn, rotary, contiguous cache",
    "cudnn, rotary, paged cache",
    "cudnn alone",
)
IMPLEMENTATIONS = ("ffi", CUDNN_CONTIGUOUS, CUDNN_ALONE, CUDNN_PAGED, "reference")

State = Any


def random_array(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def make_step(
    implementation: str, tokens: int, heads: int, head_dim: int, rotary_dim: int
) -> tuple[Callable[[State, Any], tuple[State, Any]], State, tuple[Any, ...]]:
    """(step, what goes from call to call, each layer's q, k, v and cache)."""
    width, num_pages = heads * head_dim, -(-tokens // PAGE_LEN)
    is_paged = implementation in ("ffi", "reference", CUDNN_PAGED)
    # The last page is scratch. A contiguous cache has the same room.
    shape = (num_pages + 1, heads, PAGE_LEN, head_dim) if is_paged else (1, num_pages * PAGE_LEN, heads, head_dim)
    layers = tuple(
        (random_array(layer, (tokens, 3 * width)), jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16))
        for layer in range(NUM_LAYERS)
    )
    frequencies = 10000.0 ** (-jnp.arange(0, rotary_dim, 2) / rotary_dim)
    angles = jnp.arange(tokens)[:, None] * frequencies
    rotary = (jnp.cos(angles), jnp.sin(angles))
    page_table = jax.random.permutation(jax.random.key(9), num_pages).astype(jnp.int32)[None]
    begins, num_new, lengths = (jnp.asarray([count], jnp.int32) for count in (0, tokens, 0))
    state = (random_array(99, (tokens, width)), (rotary, page_table, begins, num_new, lengths))

    def step(state: State, layer: Any) -> tuple[State, Any]:
        act, given = state
        qkv, k_cache, v_cache = layer
        # One value of a call's result goes into the next call's query: a barrier alone would not keep XLA from leaving
        # calls out whose result is overwritten.
        qkv = qkv.at[0, 0].set(act[0, 0])
        rotary, page_table, begins, num_new, lengths = given
        if implementation in ("ffi", "reference"):
            act, k_cache, v_cache, _ = custom_ops.prefill_attention(
                qkv,
                rotary,
                k_cache,
                v_cache,
                page_table,
                begins,
                num_new,
                lengths,
                act,
                max_new=tokens,
                implementation=implementation,
            )
            return (act, given), (qkv, k_cache, v_cache)
        q, k, v = jnp.moveaxis(qkv.reshape(1, tokens, 3, heads, head_dim), 2, 0)
        if implementation != CUDNN_ALONE:
            q, k = apply_rotary(q, k, (rotary[0][None, :, None], rotary[1][None, :, None]))
        if implementation == CUDNN_CONTIGUOUS:
            k_cache, v_cache = (
                jax.lax.dynamic_update_slice(cache, new, (0, lengths[0], 0, 0))
                for cache, new in ((k_cache, k), (v_cache, v))
            )
        if implementation == CUDNN_PAGED:
            positions = lengths[:, None] + jnp.arange(tokens)
            is_valid = jnp.arange(tokens) < num_new[:, None]
            k_cache, v_cache = (
                kv_pages.append(cache, new, page_table, positions, is_valid)
                for cache, new in ((k_cache, k), (v_cache, v))
            )
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return (out.reshape(tokens, width), given), (qkv, k_cache, v_cache)

    return step, state, layers


def measure(implementation: str, tokens: int, shape: tuple[int, int, int], rate: float, repeats: int) -> dict[str, Any]:
    heads, head_dim, rotary_dim = shape
    step, state, layers = make_step(implementation, tokens, heads, head_dim, rotary_dim)
    operations = 4 * heads * head_dim * tokens**2 / 2
    limit_s = max(operations / rate, 8 * 2 * tokens * heads * head_dim / 3e12)
    turns = max(2, round(RUN_S / (NUM_LAYERS * limit_s)))

    def run(state: State, layers: tuple[Any, ...]) -> tuple[State, tuple[Any, ...]]:
        def turn(_: Any, carry: tuple[State, tuple[Any, ...]]) -> tuple[State, tuple[Any, ...]]:
            state, layers = carry
            new = []
            for layer in layers:
                state, layer = step(state, layer)
                new.append(layer)
            return state, tuple(new)

        return jax.lax.fori_loop(0, turns, turn, (state, layers))

    begin = time.perf_counter()
    compiled = jax.jit(run, donate_argnums=(0, 1)).lower(state, layers).compile()
    compile_s = time.perf_counter() - begin
    times = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        state, layers = jax.block_until_ready(compiled(state, layers))
        times.append((time.perf_counter() - begin) / (turns * NUM_LAYERS))
    seconds = statistics.median(times[1:])
    return {
        "us": 1e6 * seconds,
        "us_min": 1e6 * min(times[1:]),
        "us_max": 1e6 * max(times[1:]),
        "tflop_per_s": operations / seconds / 1e12,
        "percent_of_matrix_rate": 100 * operations / seconds / rate,
        "compile_s": compile_s,
        "turns": turns,
        "num_layers": NUM_LAYERS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=256)
    parser.add_argument("--rotary-dim", type=int, default=64)
    parser.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS[:-1]))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--matrix-size", type=int, default=8192)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    rate = matrix_rate(arguments.matrix_size, "bf16")
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "json"},
        "matrix_tflop_per_s": rate / 1e12,
        "rows": [],
    }
    print(f"{result['environment']['device']}, matrix rate {rate / 1e12:.0f} TFLOP/s", flush=True)
    shape = (arguments.heads, arguments.head_dim, arguments.rotary_dim)
    for implementation in arguments.implementation:
        for tokens in arguments.tokens:
            row: dict[str, Any] = {"implementation": implementation, "tokens": tokens}
            try:
                if time.perf_counter() - begin > arguments.limit_s:
                    raise TimeoutError("no time left")
                row |= measure(implementation, tokens, shape, rate, arguments.repeats)
                text = f"{row['us']:8.1f} us  {row['percent_of_matrix_rate']:5.1f} % of the matrix rate"
            except Exception as error:
                row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
                text = row["error"].splitlines()[0]
            result["rows"].append(row)
            print(f"{implementation:32} {tokens:5} tokens  {text}", flush=True)
            write_result(arguments.json, result)


if __name__ == "__main__":
    main()
