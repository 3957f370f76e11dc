"""How fast is a checkpoint loaded, next to the disk's own reading rate, and how much host memory does that take?

Writes a random fp16 checkpoint of the asked size in shards, drops it from the page cache, and reads it cold in
processes of their own: once plainly (the disk's rate), once through `load_leaves`. Run it on a quiet machine:

    python benchmarks/bench_load.py --gigabytes 6 --json benchmarks/results/load_cpu.json
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from kogpt_jax import checkpoint, quantized_cache
from kogpt_jax.config import KOGPT_6B, Dtype, ModelConfig, Quant
from kogpt_jax.model import model_def
from kogpt_jax.sharding import make_mesh, parse_mesh

REPOSITORY = pathlib.Path(__file__).parents[1]

# Fixed part of the bound on host memory beside twice the largest tensor.
ALLOWANCE_BYTES = 300e6


def config_of_size(num_bytes: float, *, model_dim: int = 4096, vocab_size: int = KOGPT_6B.vocab_size) -> ModelConfig:
    """GPT-J's proportions in fp16, with as many layers as fit into ``num_bytes``, at least one."""
    config = ModelConfig(
        vocab_size=vocab_size,
        max_len=2048,
        model_dim=model_dim,
        num_layers=1,
        num_heads=model_dim // 256,
        rotary_dim=64,
        ffn_dim=4 * model_dim,
        dtype="fp16",
    )
    layer_bytes = 2 * 12 * model_dim**2
    num_layers = int((num_bytes - (checkpoint_bytes(config) - layer_bytes)) / layer_bytes)
    return dataclasses.replace(config, num_layers=max(1, num_layers))


def checkpoint_bytes(config: ModelConfig) -> int:
    return sum(math.prod(param.shape) * param.dtype.itemsize for param in model_def(config).params)


def largest_tensor_bytes(config: ModelConfig) -> int:
    return max(math.prod(param.shape) * param.dtype.itemsize for param in model_def(config).params)


def write_checkpoint(directory: pathlib.Path, config: ModelConfig, *, seed: int, max_shard_bytes: int = 10**9) -> None:
    """A random checkpoint through `save_pretrained`; layers share their leaves, so that it needs little memory."""
    rng = np.random.default_rng(seed)
    made: dict[str, jax.Array] = {}
    leaves = []
    for param in model_def(config).params:
        name = param.path.rpartition(".")[2]
        if name not in made:
            made[name] = jax.numpy.asarray((0.02 * rng.standard_normal(param.shape, np.float32)).astype(param.dtype))
        leaves.append(made[name])
    checkpoint.save_pretrained(directory, config, leaves, max_shard_bytes=max_shard_bytes)


def drop_from_page_cache(directory: pathlib.Path) -> None:
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # only clean pages are dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def measure_disk(directory: str) -> dict[str, float]:
    """Reads the weight files from end to end with large plain reads."""
    buffer = memoryview(bytearray(16 << 20))
    num_bytes = 0
    start = time.perf_counter()
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := os.readv(fd, [buffer]):
            num_bytes += count
        os.close(fd)
    return {"disk_bytes": num_bytes, "disk_seconds": time.perf_counter() - start}


class HostMemory:
    """Samples this process's anonymous memory, and what of it is not in arrays on CPU devices.

    Args:
        dtypes: count arrays of these only, as those that are kept.
        interval_s: time between two samples.
    """

    def __init__(self, *dtypes: np.dtype, interval_s: float = 0.005):
        self._dtypes = dtypes
        self._interval_s = interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._array_bytes = live_array_bytes(dtypes)
        self.baseline_bytes = anonymous_bytes()
        self.peak_bytes = 0  # above the baseline
        self.peak_beyond_arrays_bytes = 0  # above the baseline and the arrays alive at that moment
        self.num_samples = 0

    def __enter__(self) -> "HostMemory":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(self._interval_s):
            # Arrays first: one that appears in between counts as unexplained, never the other way round.
            arrays = live_array_bytes(self._dtypes) - self._array_bytes
            above = anonymous_bytes() - self.baseline_bytes
            self.peak_bytes = max(self.peak_bytes, above)
            self.peak_beyond_arrays_bytes = max(self.peak_beyond_arrays_bytes, above - arrays)
            self.num_samples += 1


def anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def live_array_bytes(dtypes: Sequence[np.dtype]) -> int:
    return sum(array.nbytes for array in jax.live_arrays("cpu") if array.dtype in dtypes)


def touch_memory(num_bytes: int) -> float:
    """Touches fresh memory and frees it again; bytes per second.

    A virtual machine's host backs a page only when it is first touched, which on some is slower than the disk. Pages
    touched a moment ago are backed, so that a load that follows measures the loader and not the host.
    """
    start = time.perf_counter()
    np.empty(num_bytes, np.uint8).fill(1)
    return num_bytes / (time.perf_counter() - start)


def measure_load(
    directory: str, dtype: Dtype | None = None, quant: Quant = "none", mesh_name: str = "d1p1t1"
) -> dict[str, float]:
    """Loads the checkpoint once in this process, quantised weights through their cache."""
    mesh = make_mesh(*parse_mesh(mesh_name))
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))  # the backend is up before the clock starts
    config = dataclasses.replace(checkpoint.load_config(directory, dtype=dtype), quant=quant)
    load_leaves = checkpoint.load_leaves if quant == "none" else quantized_cache.load_leaves
    with HostMemory(*{param.dtype for param in model_def(config).params}) as memory:
        start = time.perf_counter()
        leaves = load_leaves(pathlib.Path(directory), config, mesh)
        seconds = time.perf_counter() - start
    on_host = jax.default_backend() == "cpu"
    loaded_bytes = sum(leaf.nbytes for leaf in leaves)
    device_bytes: collections.Counter[jax.Device] = collections.Counter()
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            device_bytes[shard.device] += shard.data.nbytes
    return {
        "load_seconds": seconds,
        "loaded_bytes": loaded_bytes,
        "device_bytes": max(device_bytes.values()),
        "peak_bytes": memory.peak_bytes - (loaded_bytes if on_host else 0),
        "peak_beyond_arrays_bytes": memory.peak_beyond_arrays_bytes,
        "num_samples": memory.num_samples,
    }


def measure_load_in_touched_memory(directory: str, dtype: Dtype | None = None) -> dict[str, float]:
    file_bytes = sum(path.stat().st_size for path in pathlib.Path(directory).glob("*.safetensors"))
    touch_bytes_per_s = touch_memory(2 * file_bytes)  # for the arrays and for the page cache
    return {"touch_bytes_per_s": touch_bytes_per_s} | measure_load(directory, dtype)


def in_new_process(function: str, *args: str) -> dict[str, float]:
    code = (
        f"import json, sys; from benchmarks import bench_load; print(json.dumps(bench_load.{function}(*sys.argv[1:])))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", code, *args], env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout)


def main() -> None:
    from environment import environment  # beside this script; tests import this file as a module of a package

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint in 1e9 bytes")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="dtype to load in (default: as stored, fp16)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--directory", help="where the checkpoint is made and removed again (default: temporary folder)"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the result here")
    args = parser.parse_args()

    config = config_of_size(args.gigabytes * 1e9)
    largest = largest_tensor_bytes(config)
    runs = []
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        model = pathlib.Path(temporary) / "model"
        write_checkpoint(model, config, seed=0)
        for _ in range(args.repeats):
            drop_from_page_cache(model)
            run = in_new_process("measure_disk", str(model))
            drop_from_page_cache(model)
            run |= in_new_process("measure_load_in_touched_memory", str(model), *([args.dtype] if args.dtype else []))
            runs.append(run)

    bound = 2 * largest + ALLOWANCE_BYTES
    table = Table(box=box.SIMPLE)
    for title in (
        "run",
        "disk GB/s",
        "fresh memory GB/s",
        "load s",
        "load GB/s",
        "share of disk",
        "peak beyond arrays",
        "bound",
    ):
        table.add_column(title, justify="right")
    for number, run in enumerate(runs, 1):
        run["disk_bytes_per_s"] = run["disk_bytes"] / run["disk_seconds"]
        run["load_bytes_per_s"] = run["disk_bytes"] / run["load_seconds"]
        run["share_of_disk_rate"] = run["load_bytes_per_s"] / run["disk_bytes_per_s"]
        table.add_row(
            str(number),
            f"{run['disk_bytes_per_s'] / 1e9:.2f}",
            f"{run['touch_bytes_per_s'] / 1e9:.2f}",
            f"{run['load_seconds']:.2f}",
            f"{run['load_bytes_per_s'] / 1e9:.2f}",
            f"{run['share_of_disk_rate']:.0%}",
            f"{run['peak_beyond_arrays_bytes'] / 1e6:.0f} MB",
            f"{bound / 1e6:.0f} MB",
        )
    console = Console()
    console.print(f"{runs[0]['disk_bytes'] / 1e9:.2f} GB fp16, {config.num_layers} layers, ", end="")
    console.print(f"largest tensor {largest / 1e6:.0f} MB, on {jax.devices()[0].device_kind}")
    console.print(table)
    if args.json:
        result = {
            "benchmark": "load",
            "environment": environment(),
            "config": dataclasses.asdict(config),
            "dtype": args.dtype or config.dtype,
            "largest_tensor_bytes": largest,
            "bound_bytes": bound,
            "runs": runs,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if any(run["peak_beyond_arrays_bytes"] > bound for run in runs):
        sys.exit(f"host memory exceeds twice the largest tensor + {ALLOWANCE_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
