"""How do prefill and a decode step scale over meshes of devices, and is the text the same on each?

Every mesh (data x pipe x tensor) that the visible devices allow, each in a process of its own, so that a mesh's peak
memory is its own; random weights of one seed, which are the same model on every mesh:

    python benchmarks/bench_mesh.py --batch 1 8 32 --quant none w8a16 --json benchmarks/results/mesh.json
    python benchmarks/bench_mesh.py --devices 8 --preset tiny --dtype fp32 --batch 1 8 --prompt-len 16

With ``--devices`` so many CPU devices are simulated, which share the machine's cores. What is compared with one device
(logits, greedy text) holds there; speed-up, limits, memory and collectives would say nothing and are null.

Times are those of bench_generate.py. A step's limit is what a device must read / the read bandwidth measured in the
same run: its shard's weights, in each of a pipeline's stages one after the other, and its own keys and values. The
share of collectives is the time that their kernels cover on the first GPU in a profile, which counts waiting for the
other devices (and in AllReduceNormKernel a LayerNorm), / the profiled time. Speed-up is over one device with as many
rows in all, scaled speed-up over one with as many rows a device; efficiency is the former / the number of devices.
"""

import argparse
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from bench_generate import (
    FEW_TOKENS,
    MANY_TOKENS,
    PRESETS,
    device_step_bytes,
    make_config,
    measure,
    prompts,
    read_bandwidth,
)
from environment import environment, write_result
from profile_step import Decoder, account, read_trace, record
from rich import box
from rich.console import Console
from rich.table import Table

from kogpt_jax import KoGPT, SamplingParams
from kogpt_jax.config import DTYPES, QUANTS
from kogpt_jax.engine import STEPS_PER_CHUNK
from kogpt_jax.errors import InputError
from kogpt_jax.ops import CHOICES, describe
from kogpt_jax.sharding import mesh_name, parse_mesh

ONE_DEVICE = "d1p1t1"
COLLECTIVE = re.compile(r"nccl|all.?reduce|all.?gather|collective|permute|send|recv", re.IGNORECASE)
NUM_COMPARED_TOKENS = 1 + 2 * STEPS_PER_CHUNK
PROFILED_CHUNKS = 4


def all_meshes(num_devices: int) -> list[str]:
    """Names of all meshes of 1, 2, 4, 8 ... devices, those of one size together."""
    powers = [2**exponent for exponent in range(num_devices.bit_length())]
    extents = [extents for extents in itertools.product(powers, repeat=3) if np.prod(extents) <= num_devices]
    return ["d{}p{}t{}".format(*extent) for extent in sorted(extents, key=lambda extent: (np.prod(extent), extent))]


def collective_share(model: KoGPT, batch: int, prompt_len: int) -> float | None:
    """Per cent of a profiled step in which collectives run on the first GPU; None where the profile has no GPU."""
    decoder = Decoder(model, batch, prompt_len, 1 + PROFILED_CHUNKS, "greedy")
    decoder.run(1)
    with tempfile.TemporaryDirectory() as folder:
        record(decoder, PROFILED_CHUNKS, folder)
        events, _ = read_trace(folder)
    if not events:
        return None
    accounts = account(events, PROFILED_CHUNKS * STEPS_PER_CHUNK)
    own = sum(kernel["own_us_per_step"] for kernel in accounts["kernels"] if COLLECTIVE.search(kernel["name"]))
    return 100 * own / accounts["window_us_per_step"]


def compare(model: KoGPT, batch: int, prompt_len: int, reference: pathlib.Path) -> dict[str, Any]:
    """Logits of a prompt and greedy texts of a batch against those of one device, which its run leaves in a file."""
    rows = prompts(model.config, batch, prompt_len)
    params = SamplingParams(max_new_tokens=NUM_COMPARED_TOKENS, ignore_eos=True)
    logits = model.logits(rows[0])
    tokens = np.array([completion.token_ids for completion in model.generate_ids(rows, params)])
    if mesh_name(model.mesh) == ONE_DEVICE:
        np.savez(reference, logits=logits, tokens=tokens)
    if not reference.exists():  # one device was refused
        return dict.fromkeys(("max_logit_difference", "largest_logit", "same_greedy_text", "same_tokens_percent"))
    with np.load(reference) as one:
        return {
            "max_logit_difference": float(np.abs(logits - one["logits"]).max()),
            "largest_logit": float(np.abs(one["logits"]).max()),
            "same_greedy_text": bool(np.array_equal(tokens, one["tokens"])),
            "same_tokens_percent": 100 * float(np.mean(tokens == one["tokens"])),
        }


def run_mesh(task: dict[str, Any]) -> dict[str, Any]:
    """All batches of one mesh and precision, in this process."""
    if task["devices"] is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", task["devices"])
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = task["mesh"]
    config = make_config(task["preset"], task["layers"], task["dtype"], task["quant"])
    try:
        model = KoGPT.from_random(
            config, mesh=mesh, max_batch_size=max(task["batch"]), implementation=task["implementation"]
        )
    except InputError as error:
        return {"refused": str(error)}
    is_gpu = jax.default_backend() == "gpu"  # behind the model, which settles how CUDA starts
    rows = []
    for batch in task["batch"]:
        row = measure(model, batch, task["prompt_len"], "greedy", task["repeats"])
        row["mesh"] = mesh
        row["num_devices"] = model.mesh.size
        row["collectives_percent"] = (
            collective_share(model, batch, task["prompt_len"]) if is_gpu and model.mesh.size > 1 else None
        )
        reference = pathlib.Path(task["folder"]) / f"{config.dtype}-{config.quant}-{batch}.npz"
        rows.append(row | compare(model, batch, task["prompt_len"], reference))
    stats = [device.memory_stats() or {} for device in model.mesh.devices.flat]
    peaks = [device_stats["peak_bytes_in_use"] for device_stats in stats if "peak_bytes_in_use" in device_stats]
    bandwidth = read_bandwidth(2**32) if is_gpu else None  # after the peaks: it takes memory too
    for row in rows:
        row["peak_bytes_per_device"] = max(peaks) if peaks else None  # over all batches of the mesh
        row["step_limit_ms"] = row["step_percent_of_limit"] = None
        if bandwidth is not None:
            context = row["prompt_len"] + (FEW_TOKENS + MANY_TOKENS) / 2
            num_bytes = device_step_bytes(config, parse_mesh(mesh), row["batch"], context)
            row["step_limit_ms"] = 1e3 * num_bytes / bandwidth
            row["step_percent_of_limit"] = 100 * row["step_limit_ms"] / row["step_ms"]
    return {
        "rows": rows,
        "read_bytes_per_s": bandwidth,
        "ops": describe(model.ops),
        "environment": environment(),
    }


def in_new_process(task: dict[str, Any]) -> dict[str, Any]:
    """`run_mesh` elsewhere. A mesh whose process fails has that in its place, and the others go on."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def count_devices(simulated: int | None) -> int:
    """Asked in a process of its own: a GPU's memory is for the meshes."""
    if simulated is not None:
        return simulated
    command = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def with_speed_ups(rows: Sequence[dict[str, Any]], *, are_simulated: bool) -> Iterator[dict[str, Any]]:
    """Rows with what they gain over one device of the same precision; null on devices that are simulated."""
    on_one = [row for row in rows if row["mesh"] == ONE_DEVICE and not are_simulated]
    one = {(row["dtype"], row["quant"], row["batch"]): row for row in on_one}
    for row in rows:
        same_rows = one.get((row["dtype"], row["quant"], row["batch"]))
        same_share = one.get((row["dtype"], row["quant"], row["batch"] / row["num_devices"]))
        speed_up = None if same_rows is None else same_rows["step_ms"] / row["step_ms"]
        yield row | {
            "speed_up": speed_up,
            "efficiency_percent": None if speed_up is None else 100 * speed_up / row["num_devices"],
            "prefill_speed_up": None if same_rows is None else same_rows["prefill_ms"] / row["prefill_ms"],
            "scaled_speed_up": None if same_share is None else row["tokens_per_s"] / same_share["tokens_per_s"],
        }


def print_table(result: dict[str, Any]) -> None:
    device = result["environment"]["device"] if result["environment"] else "no device"
    devices = f"{result['num_devices']} x {device}{', simulated' if result['are_simulated'] else ''}"
    table = Table(title=f"{result['preset']} on {devices}, prompts of {result['prompt_len']} tokens", box=box.SIMPLE)
    columns = (
        ("mesh", "mesh", "{}"),
        ("dtype", "dtype", "{}"),
        ("quant", "quant", "{}"),
        ("batch", "batch", "{}"),
        ("prefill ms", "prefill_ms", "{:.2f}"),
        ("step ms", "step_ms", "{:.3f}"),
        ("tok/s", "tokens_per_s", "{:.0f}"),
        ("% of limit", "step_percent_of_limit", "{:.0f}"),
        ("collectives %", "collectives_percent", "{:.1f}"),
        ("speed-up", "speed_up", "{:.2f}"),
        ("efficiency %", "efficiency_percent", "{:.0f}"),
        ("scaled", "scaled_speed_up", "{:.2f}"),
        ("peak GB", "peak_gb_per_device", "{:.2f}"),
        ("logits differ", "max_logit_difference", "{:.1e}"),
        ("same text", "same_greedy_text", "{}"),
    )
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    for row in result["rows"]:
        peak = row["peak_bytes_per_device"]
        row = row | {"peak_gb_per_device": None if peak is None else peak / 1e9}
        table.add_row(*("-" if row[key] is None else form.format(row[key]) for _, key, form in columns))
    console = Console(width=170)
    console.print(table)
    for mesh, reason in result["not_run"].items():
        console.print(f"{mesh}: {reason}")


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Tokens a second of each mesh, a panel a precision and a line a batch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = result["rows"]
    meshes = list(dict.fromkeys(row["mesh"] for row in rows))
    precisions = list(dict.fromkeys((row["dtype"], row["quant"]) for row in rows))
    figure, panels = pyplot.subplots(
        1, len(precisions), figsize=(1.5 + 5 * len(precisions), 4), sharey=True, squeeze=False
    )
    for panel, (dtype, quant) in zip(panels[0], precisions, strict=True):
        for batch in sorted({row["batch"] for row in rows}):
            of_batch = [row for row in rows if (row["dtype"], row["quant"], row["batch"]) == (dtype, quant, batch)]
            places = [meshes.index(row["mesh"]) for row in of_batch]
            panel.plot(places, [row["tokens_per_s"] for row in of_batch], marker="o", label=f"batch {batch}")
        panel.set_title(dtype if quant == "none" else f"{dtype}, {quant}")
        panel.set_xticks(range(len(meshes)), meshes, rotation=60)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens/s of simulated devices on shared cores" if result["are_simulated"] else "tokens/s")
    panels[0][-1].legend()
    figure.suptitle(f"{result['preset']}, {result['environment']['device']}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help=argparse.SUPPRESS)  # what a process that this one starts shall measure
    parser.add_argument("--devices", type=int, help="simulate so many CPU devices (default: the visible ones)")
    parser.add_argument("--mesh", nargs="+", help="these meshes only, beside d1p1t1")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="kogpt-6b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset, for a quick look")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--quant", choices=QUANTS, nargs="+", default=["none"])
    parser.add_argument("--implementation", choices=CHOICES, default="auto", help="what runs the ops")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    parser.add_argument("--plot", type=pathlib.Path, help="draw tokens/s here (.svg, .png); needs matplotlib")
    arguments = parser.parse_args()

    if arguments.task is not None:
        print(json.dumps(run_mesh(json.loads(arguments.task))))
        return
    if arguments.plot is not None:
        __import__("matplotlib")  # before hours of measuring
    num_devices = count_devices(arguments.devices)
    meshes = [ONE_DEVICE, *arguments.mesh] if arguments.mesh else all_meshes(num_devices)
    options = {name: getattr(arguments, name) for name in ("devices", "preset", "layers", "implementation", "batch")}
    options |= {"prompt_len": arguments.prompt_len, "repeats": arguments.repeats}
    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    details: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for mesh, dtype, quant in itertools.product(dict.fromkeys(meshes), arguments.dtype, arguments.quant):
            print(f"{mesh} {dtype} {quant}", file=sys.stderr)
            found = in_new_process(options | {"folder": folder, "mesh": mesh, "dtype": dtype, "quant": quant})
            if "rows" not in found:
                not_run[f"{mesh} {dtype} {quant}"] = next(iter(found.values()))
                continue
            rows += found.pop("rows")
            details.append({"mesh": mesh, "dtype": dtype, "quant": quant} | found)
    are_simulated = arguments.devices is not None
    result = {
        "benchmark": "mesh",
        "preset": arguments.preset,
        "num_layers": arguments.layers or PRESETS[arguments.preset].num_layers,
        "num_devices": num_devices,
        "are_simulated": are_simulated,
        "prompt_len": arguments.prompt_len,
        "rows": list(with_speed_ups(rows, are_simulated=are_simulated)),
        "not_run": not_run,
        "runs": [{name: value for name, value in detail.items() if name != "environment"} for detail in details],
        "environment": details[0]["environment"] if details else None,
    }
    print_table(result)
    write_result(arguments.json, result)
    if arguments.plot is not None and rows:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
