"""Where does a decode step's time go?

Some chunks of decode steps of a model of random weights under JAX's profiler, and from its trace the kernels of a step:

    python benchmarks/profile_step.py --batch 1 --json benchmarks/results/profile_h100_bf16_b1.json

Kernels overlap where one is launched before the kernel ahead of it has ended (programmatic dependent launch), and then
wait: their times add up to more than the step. So the share of a step that kernels account for is that of the union of
their intervals, and each kernel's "own" time is what it adds to the union of those that began before it.

Kernels of `custom_ops.decode_layers` and `decode_steps` are launched as one CUDA graph and have no scope: their names
tell.

While it is profiled XLA runs what stands in command buffers (CUDA graphs) operation by operation, unless the
environment says XLA_FLAGS=--xla_enable_command_buffers_during_profiling=true; hence the step's time without the
profiler beside it. A trace of another layout than expected goes into the JSON as the names of its rows.
"""

import argparse
import dataclasses
import gzip
import json
import os
import pathlib
import re
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from bench_generate import SAMPLING, add_model_arguments, device_step_bytes, make_model, prompts, read_bandwidth
from environment import environment, write_result

from kogpt_jax import KoGPT, decoding
from kogpt_jax.engine import STEPS_PER_CHUNK
from kogpt_jax.ops import describe
from kogpt_jax.packing import deal
from kogpt_jax.sharding import mesh_name, parse_mesh

SCOPES = ("w_in", "attention", "w_out", "lm_head", "sample")  # jax.named_scope in the model
# Rows of a device that tell again, by operation or module, what its streams did.
DERIVED_ROWS = ("XLA Modules", "XLA Ops", "XLA TraceMe", "Steps", "Framework", "Source", "Launch Stats", "TensorFlow")
MANY_EVENTS = 1_000_000  # the writer of trace.json.gz drops what is beyond


class Event(NamedTuple):
    """A kernel or a copy on a stream, in us."""

    begin: float
    end: float
    name: str
    scope: str


class Decoder:
    """Runs decode chunks as the engine does, without a look at the tokens between them."""

    def __init__(self, model: KoGPT, batch: int, prompt_len: int, num_chunks: int, sampling: str):
        self._model = model
        self._static: dict[str, Any] = {"definition": model._definition, "mesh": model.mesh}
        params = dataclasses.replace(
            SAMPLING[sampling], max_new_tokens=num_chunks * STEPS_PER_CHUNK + 1, ignore_eos=True
        )
        requests = model._requests(prompts(model.config, batch, prompt_len), params)
        slots = deal(requests, model.mesh.shape["data"], multiple=model.mesh.shape["pipe"])
        self._state, emitted = model._prefill(slots)
        self.rows, self.capacity = self._state.cache.page_table.shape[0], self._state.cache.max_len
        jax.block_until_ready(emitted)

    def run(self, num_chunks: int) -> float:
        """Seconds of so many chunks, all dispatched at once."""
        begin = time.perf_counter()
        emitted = None
        for _ in range(num_chunks):
            self._state, emitted = decoding.decode_loop(
                self._model.leaves, self._state, num_steps=STEPS_PER_CHUNK, **self._static
            )
        jax.block_until_ready(emitted)
        return time.perf_counter() - begin


def record(decoder: Decoder, num_chunks: int, folder: str) -> float:
    """Seconds of the chunks under the profiler, which writes to a folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its events would crowd the kernels out of the trace
    options.host_tracer_level = 1
    with jax.profiler.trace(folder, create_perfetto_trace=False, profiler_options=options):
        return decoder.run(num_chunks)


def read_trace(folder: str) -> tuple[list[Event], dict[str, Any]]:
    """Events of the first GPU's streams in order, and what the trace consists of."""
    files = sorted(pathlib.Path(folder).rglob("*"))
    layout: dict[str, Any] = {"files": [file.name for file in files if file.is_file()]}
    problems = []
    for suffix, read in ((".trace.json.gz", _read_json), (".xplane.pb", _read_xplane)):
        for file in files:
            if file.name.endswith(suffix):
                try:
                    events = sorted(read(file, layout))
                except Exception as error:  # the layout is not promised: the other file may do
                    problems.append(f"{file.name}: {type(error).__name__}: {error}")
                    continue
                if events:
                    return events, layout | {"read": file.name, "problems": problems}
    return [], layout | {"problems": problems}


def _read_json(file: pathlib.Path, layout: dict[str, Any]) -> Iterator[Event]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    processes: dict[Any, str] = {}
    threads: dict[tuple[Any, Any], str] = {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    layout["json_events"] = len(events)
    layout["json_is_cut"] = len(events) >= MANY_EVENTS
    layout["json_rows"] = [f"{processes.get(pid)} / {name}" for (pid, _), name in threads.items()][:200]
    device = _first_gpu(processes.values())
    for event in events:
        row = threads.get((event.get("pid"), event.get("tid")), "")
        if (
            event.get("ph") == "X"
            and device is not None
            and processes.get(event.get("pid")) == device
            and _is_stream(row)
        ):
            begin, texts = float(event["ts"]), event.get("args", {}).values()
            yield Event(begin, begin + float(event.get("dur", 0)), event["name"], _scope(texts))


def _read_xplane(file: pathlib.Path, layout: dict[str, Any]) -> Iterator[Event]:
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    layout["xplane_rows"] = [f"{plane.name} / {line.name}" for plane in planes for line in plane.lines][:200]
    device = _first_gpu(plane.name for plane in planes)
    for plane in planes:
        for line in plane.lines:
            if plane.name == device and _is_stream(line.name):
                for event in line.events:
                    begin = event.start_ns / 1e3
                    texts = (value for _, value in event.stats)
                    yield Event(begin, begin + event.duration_ns / 1e3, event.name, _scope(texts))


def _first_gpu(names: Iterable[str]) -> str | None:
    return min((name for name in names if "/device:GPU" in name), default=None)


def _is_stream(row: str) -> bool:
    return "Stream" in row and not row.startswith(DERIVED_ROWS)


def _scope(texts: Iterable[Any]) -> str:
    """The named scope in an event's attributes, the innermost one."""
    for text in texts:
        if isinstance(text, str) and "/" in text:
            for part in reversed(text.split("/")):
                if part in SCOPES:
                    return part
    return ""


def kernel_name(name: str) -> str:
    """Without its arguments and XLA's numbers, so that the layers' kernels are one: loop_add_fusion_12."""
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"(?<=[\w>])\([^()]*(\([^()]*\)[^()]*)*\)( \[clone .*\])?$", "", name)
    return re.sub(r"([._]\d+)+$", "", name) or name


def account(events: Sequence[Event], num_steps: int) -> dict[str, Any]:
    """A step's kernels in total and by name; events are in the order in which they began."""
    begin, end = events[0].begin, max(event.end for event in events)
    groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    gaps = []
    covered_to, before = begin, ""
    union = 0.0
    for event in events:
        if event.begin > covered_to:
            gaps.append((event.begin - covered_to, before, kernel_name(event.name)))
        own = max(0.0, event.end - max(event.begin, covered_to))
        union += own
        if event.end >= covered_to:
            covered_to, before = event.end, kernel_name(event.name)
        group = groups[kernel_name(event.name), event.scope]
        group[0] += 1
        group[1] += event.end - event.begin
        group[2] += own
    total = sum(group[1] for group in groups.values())
    by_pair: dict[tuple[str, str], list[float]] = defaultdict(list)
    for gap, previous, following in gaps:
        by_pair[previous, following].append(gap)
    return {
        "num_steps": num_steps,
        "window_us_per_step": (end - begin) / num_steps,
        "union_us_per_step": union / num_steps,
        "percent_of_window_in_kernels": 100 * union / (end - begin) if end > begin else None,
        "kernel_us_per_step": total / num_steps,
        "kernels_per_step": len(events) / num_steps,
        "gap_us_per_step": sum(gap for gap, _, _ in gaps) / num_steps,
        "gaps_per_step": len(gaps) / num_steps,
        "gaps": [
            {
                "after": previous,
                "before": following,
                "per_step": len(all_),
                "us_per_step": sum(all_),
                "max_us": max(all_),
            }
            | {"per_step": len(all_) / num_steps, "us_per_step": sum(all_) / num_steps}
            for (previous, following), all_ in sorted(by_pair.items(), key=lambda item: -sum(item[1]))[:20]
        ],
        "kernels": [
            {
                "name": name,
                "scope": scope,
                "per_step": count / num_steps,
                "us_per_step": us / num_steps,
                "us_each": us / count,
                "own_us_per_step": own / num_steps,
                "own_percent_of_window": 100 * own / (end - begin) if end > begin else None,
            }
            for (name, scope), (count, us, own) in sorted(groups.items(), key=lambda item: -item[1][2])
        ],
    }


def print_accounts(result: dict[str, Any]) -> None:
    print(
        f"step {result['step_us']:.1f} us without the profiler, {result['profiled_step_us'] or 0:.1f} us with it; "
        f"limit {result['step_limit_us']:.1f} us; {result['ops']}"
    )
    accounts = result["accounts"]
    if accounts is None:
        print(f"the trace has no GPU row with streams: {json.dumps(result['trace'], indent=1)[:3000]}")
        return
    print(
        f"on the device {accounts['window_us_per_step']:.1f} us a step: kernels cover "
        f"{accounts['union_us_per_step']:.1f} us = {accounts['percent_of_window_in_kernels']:.1f} % "
        f"(union of intervals; {result['percent_of_step_in_kernels']:.1f} % of the step without the profiler), "
        f"{accounts['gaps_per_step']:.1f} gaps {accounts['gap_us_per_step']:.1f} us; "
        f"{accounts['kernels_per_step']:.1f} kernels of {accounts['kernel_us_per_step']:.1f} us, overlaps counted twice"
    )
    print(f"{'a step':>8} {'us':>9} {'us each':>8} {'own us':>9} {'%':>6}  scope      kernel")
    for row in accounts["kernels"][:40]:
        print(
            f"{row['per_step']:8.2f} {row['us_per_step']:9.2f} {row['us_each']:8.2f} {row['own_us_per_step']:9.2f} "
            f"{row['own_percent_of_window'] or 0:6.2f}  {row['scope']:10} {row['name'][:90]}"
        )
    for gap in accounts["gaps"][:8]:
        print(
            f"gaps {gap['us_per_step']:8.2f} us in {gap['per_step']:.2f} a step, at most {gap['max_us']:.1f}: "
            f"{gap['after'][:50]} -> {gap['before'][:50]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--mesh", default="d1p1t1", help="data x pipe x tensor devices; the first one is profiled")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--sampling", choices=sorted(SAMPLING), default="greedy")
    parser.add_argument("--chunks", type=int, default=4, help=f"chunks of {STEPS_PER_CHUNK} steps that are profiled")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    parser.add_argument("--keep-trace", type=pathlib.Path, help="leave the profiler's files in this folder")
    arguments = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    model = make_model(arguments, arguments.batch, arguments.mesh)
    config = model.config
    # Once to warm up, three times without the profiler, and once with it, over the same positions of the texts.
    warm_up, repeats = 1, 3
    num_chunks = warm_up + arguments.chunks
    times = []
    for _ in range(repeats):
        decoder = Decoder(model, arguments.batch, arguments.prompt_len, num_chunks, arguments.sampling)
        decoder.run(warm_up)
        times.append(decoder.run(arguments.chunks))
    decoder = Decoder(model, arguments.batch, arguments.prompt_len, num_chunks, arguments.sampling)
    decoder.run(warm_up)
    num_steps = arguments.chunks * STEPS_PER_CHUNK
    profiled_s, accounts = None, None
    layout: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = str(arguments.keep_trace or temporary)
            profiled_s = record(decoder, arguments.chunks, folder)
            events, layout = read_trace(folder)
        if events:
            accounts = account(events, num_steps)
    except Exception as error:  # the step's time is wanted all the same
        traceback.print_exc()
        layout["error"] = f"{type(error).__name__}: {error}"
    step_us = 1e6 * float(np.median(times)) / num_steps
    context = arguments.prompt_len + STEPS_PER_CHUNK * (warm_up + arguments.chunks / 2)
    bandwidth = read_bandwidth(2**28 if jax.default_backend() == "cpu" else 2**32)
    result = {
        "preset": arguments.preset,
        "num_layers": config.num_layers,
        "dtype": config.dtype,
        "quant": config.quant,
        "mesh": mesh_name(model.mesh),
        "batch": decoder.rows,
        "prompt_len": arguments.prompt_len,
        "capacity": decoder.capacity,
        "sampling": arguments.sampling,
        "ops": describe(model.ops),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "ceilings": {"read_bytes_per_s": bandwidth},
        "step_us": step_us,
        "step_limit_us": 1e6 * device_step_bytes(config, parse_mesh(arguments.mesh), decoder.rows, context) / bandwidth,
        "profiled_step_us": None if profiled_s is None else 1e6 * profiled_s / num_steps,
        "percent_of_step_in_kernels": None if accounts is None else 100 * accounts["union_us_per_step"] / step_us,
        "accounting": "union of the kernels' intervals: under dependent launch kernels overlap",
        "accounts": accounts,
        "trace": layout,
        "environment": environment(),
    }
    print_accounts(result)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
