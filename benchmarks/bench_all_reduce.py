"""How long does a sum over GPUs of as few values as a decode step has take: XLA's ways beside `custom_ops.all_reduce`?

Each way in a process of its own, since XLA's flags count for a process:

    python benchmarks/bench_all_reduce.py --json benchmarks/results/all_reduce_h200_x2.json

A call is one turn of a jitted loop under `jax.shard_map`: a small kernel that scales the sum of the call before, and
the sum. "nothing" is the loop without the sum, and a sum's time is what it adds to that. Decode steps run without XLA's
command buffers (`decoding.WITHOUT_CUDA_GRAPHS`), and so does a way whose name does not have them.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from environment import environment, write_result
from jax.sharding import PartitionSpec

from custom_ops import all_reduce
from kogpt_jax import runtime
from kogpt_jax.decoding import WITHOUT_CUDA_GRAPHS
from kogpt_jax.sharding import cuda_devices, make_mesh

ONE_SHOT = "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=true"
GRAPHS = "--xla_gpu_enable_command_buffer=+COLLECTIVES --xla_gpu_graph_min_graph_size=1"
# Name: XLA's flags, and whether command buffers (CUDA graphs) are on.
WAYS = {
    "nothing": ("", False),
    "psum": ("", False),
    "psum one-shot": (ONE_SHOT, False),
    "nothing in graphs": (GRAPHS, True),
    "psum in graphs": (GRAPHS, True),
    "psum one-shot in graphs": (f"{ONE_SHOT} {GRAPHS}", True),
    "ffi": ("", False),
    "ffi in graphs": (GRAPHS, True),
}


def measure(way: str, rows: int, dim: int, num_devices: int, calls: int, repeats: int) -> dict[str, Any]:
    """Microseconds of a turn of the loop: the median of ``repeats`` runs."""
    mesh = make_mesh(1, 1, num_devices)
    groups = tuple(shards for stages in cuda_devices(mesh) for shards in stages)

    def turn(_: Any, x: jax.Array) -> jax.Array:
        x = x * (1 / num_devices)
        if way.startswith("psum"):
            return jax.lax.psum(x, "tensor")
        if way.startswith("ffi"):
            return all_reduce(x, "tensor", device_groups=groups, implementation="ffi")
        return x

    def run(x: jax.Array) -> jax.Array:
        return jax.shard_map(
            lambda x: jax.lax.fori_loop(0, calls, turn, x),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(x)

    x = jax.random.normal(jax.random.key(0), (rows, dim), jnp.float32)
    options = None if WAYS[way][1] else WITHOUT_CUDA_GRAPHS
    compiled = jax.jit(run, compiler_options=options)
    times = []
    for _ in range(2 + repeats):
        begin = time.perf_counter()
        y = jax.block_until_ready(compiled(x))
        times.append(1e6 * (time.perf_counter() - begin) / calls)
    # A psum of equal parts, each divided by their number, changes nothing.
    error = float(jnp.abs(y - x).max()) if way[0] != "n" else None
    return {"way": way, "rows": rows, "us": statistics.median(times[2:]), "us_min": min(times[2:]), "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=sorted(WAYS), help=argparse.SUPPRESS)  # what a process of its own measures
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=500, help="turns of the loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    arguments = parser.parse_args()
    if arguments.way is not None:
        runtime.configure(num_shards=arguments.devices)
        jax.config.update("jax_enable_compilation_cache", False)
        rest = (arguments.dim, arguments.devices, arguments.calls, arguments.repeats)
        rows = [measure(arguments.way, rows, *rest) for rows in arguments.rows]
        print(json.dumps({"rows": rows, "environment": environment()}))
        return

    rows, not_run, details = [], {}, None
    for way, (flags, _) in WAYS.items():
        own_flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
        done = subprocess.run(
            command, env=os.environ | {"XLA_FLAGS": own_flags}, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            not_run[way] = f"exit code {done.returncode}"
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        rows += found["rows"]
        details = found["environment"]
    base = {(row["way"], row["rows"]): row["us"] for row in rows}
    for row in rows:
        nothing = base.get(("nothing in graphs" if WAYS[row["way"]][1] else "nothing", row["rows"]))
        row["sum_us"] = None if nothing is None or row["error"] is None else row["us"] - nothing
        sum_us = "-" if row["sum_us"] is None else f"{row['sum_us']:.2f}"
        print(f"{row['way']:26} {row['rows']:3} rows {row['us']:7.2f} us a turn, sum {sum_us:>6}, error {row['error']}")
    print(*(f"{way}: {reason}" for way, reason in not_run.items()), sep="\n")
    write_result(
        arguments.json,
        {
            "devices": arguments.devices,
            "dim": arguments.dim,
            "flags": {way: flags for way, (flags, _) in WAYS.items()},
            "rows": rows,
            "not_run": not_run,
            "environment": details,
        },
    )


if __name__ == "__main__":
    main()
