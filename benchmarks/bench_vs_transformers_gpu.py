"""How fast are we beside Hugging Face transformers on one GPU? Random weights at the KoGPT-6B shape, greedy.

    python benchmarks/bench_vs_transformers_gpu.py --out benchmarks/results/gpu_vs_transformers.json
    python benchmarks/bench_vs_transformers_gpu.py --preset tiny --dtype fp32 --batch 1 2 --new-tokens 16

Each system makes its own weights, on the device and in a process of its own, one after another. So the texts cannot be
compared: the tests pin the numerics to transformers (`make oracle`). What is compared is the time; a step is (time of
``--new-tokens`` new tokens - time of 9) / the difference, whole calls through the public API. Its limit is that of
bench_generate.py. GPT-J has eager attention alone in transformers, but for the package flash-attn. It runs in these
ways, the fastest counts:

    hf-generate         ``generate``
    hf-generate-static  ``generate`` with a static cache, for which it compiles the step itself on a GPU
    hf-compiled-loop    a loop of a prefill and steps with a static cache; a step, argmax included, is one CUDA graph

That a way computes the model is checked: each of its tokens must be the best, up to rounding, in one plain pass over
its prompt and text. A way that fails, or is not finished in time, has that in the JSON file in place of its figures.
Without a GPU all runs on the CPU. Needs PyTorch and transformers beside this package. Exit code 1 where a batch lacks
figures of either side.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from bench_generate import FEW_TOKENS, PRESETS, SAMPLING, make_config, read_bandwidth, step_bytes
from environment import environment, write_result
from rich import box
from rich.console import Console
from rich.table import Table

from kogpt_jax import KoGPT
from kogpt_jax.config import DTYPES, Dtype, ModelConfig, Quant
from kogpt_jax.environment import check_writable
from kogpt_jax.errors import InputError, one_line
from kogpt_jax.ops import describe

HF_WAYS = ("hf-generate", "hf-generate-static", "hf-compiled-loop")
OUR_MODES: dict[str, tuple[Quant, str | None]] = {
    "kogpt_jax": ("none", None),
    "kogpt_jax-w8a16": ("w8a16", None),
    "kogpt_jax-w8a8-kv8": ("w8a8", "int8"),
}
# Two logits this close, relative to the largest of all, may change places by rounding; a token picked blindly lies
# about 1 below the best. Finer errors show in fp32 alone, where steps with a wrong rotation are noticed.
TIES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}

Rows = list[list[int]]
Generate = Callable[[Rows, int], Rows]  # (prompts, new tokens a row) -> the new tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a child process runs."""

    system: str
    preset: str
    layers: int | None
    dtype: Dtype
    batch: list[int]
    prompt_len: int
    new_tokens: int
    repeats: int

    @property
    def config(self) -> ModelConfig:
        """The model; transformers runs it unquantised."""
        quant, kv_dtype = OUR_MODES.get(self.system, ("none", None))
        return make_config(self.preset, self.layers, self.dtype, quant, kv_dtype)

    def prompts(self, batch: int) -> Rows:
        """All of one length: transformers then needs no padding."""
        return np.random.default_rng(0).integers(5, self.config.vocab_size, (batch, self.prompt_len)).tolist()


# -- In the child processes -------------------------------------------------------------------------------------------


def measure(generate: Generate, task: Task, batch: int) -> tuple[dict[str, Any], Rows]:
    """Times of one batch, and the text of the last whole call."""
    prompts = task.prompts(batch)
    lengths = (1, FEW_TOKENS, task.new_tokens)
    tokens: Rows = []

    def seconds(new_tokens: int) -> float:
        nonlocal tokens
        begin = time.perf_counter()
        tokens = generate(prompts, new_tokens)
        return time.perf_counter() - begin

    first_call_s = seconds(task.new_tokens)
    for length in lengths:
        seconds(length)
    # The lengths in turn, so that a drift of the clocks meets all of them.
    times = [[seconds(length) for length in lengths] for _ in range(task.repeats)]
    if {len(row) for row in tokens} != {task.new_tokens}:
        raise ValueError(f"rows of {[len(row) for row in tokens]} new tokens instead of {task.new_tokens}")
    first_token_s, few_s, call_s = (statistics.median(column) for column in zip(*times, strict=True))
    figures = {
        "first_token_ms": first_token_s * 1e3,
        "step_ms": (call_s - few_s) / (task.new_tokens - FEW_TOKENS) * 1e3,
        "call_ms": call_s * 1e3,
        "call_tokens_per_s": batch * task.new_tokens / call_s,
        "all_call_ms": [row[-1] * 1e3 for row in times],
        "first_call_s": first_call_s,
    }
    return figures, tokens


def prepare_ours(task: Task) -> Callable[[int], dict[str, Any]]:
    """The model; what measures a batch of it."""
    model = KoGPT.from_random(task.config, max_batch_size=max(task.batch))

    def generate(prompts: Rows, new_tokens: int) -> Rows:
        params = dataclasses.replace(SAMPLING["greedy"], max_new_tokens=new_tokens)
        return [list(completion.token_ids) for completion in model.generate_ids(prompts, params)]

    def measure_batch(batch: int) -> dict[str, Any]:
        figures, _ = measure(generate, task, batch)
        return figures | {"ops": describe(model.ops)}

    return measure_batch


def prepare_transformers(task: Task) -> Callable[[int], dict[str, Any]]:
    """The model; what measures a batch of it in one of the ways."""
    import torch
    import transformers
    from torch._dynamo.utils import counters

    if task.dtype != "fp32":
        torch.set_float32_matmul_precision("high")  # exact for attention's 16-bit values, which GPT-J multiplies in f32
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        # Its own initialisation: normal weights of 0.02. In f32 first, in which the table of rotary angles is made.
        model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**task.config.to_hf_dict()))
    model = model.to(getattr(torch, task.config.jax_dtype.name)).eval()
    capacity = task.prompt_len + task.new_tokens
    if task.system == "hf-compiled-loop":
        generate = compiled_loop(model, capacity)
    elif task.system == "hf-generate-static":
        generate = with_generate(model, cache_implementation="static", max_cache_len=capacity)
    else:
        generate = with_generate(model)

    def measure_batch(batch: int) -> dict[str, Any]:
        counters.clear()
        with torch.no_grad():
            figures, tokens = measure(generate, task, batch)
            compiled = {
                "compiled_graphs": counters["stats"]["unique_graphs"],
                "graph_breaks": sum(counters["graph_break"].values()),
                "cuda_graph_skips": counters["inductor"]["cudagraph_skips"],
            }
            return figures | compiled | agreement(model, task, tokens)

    return measure_batch


def with_generate(model: Any, **options: Any) -> Generate:
    """transformers' ``generate`` with options of its configuration."""
    import torch
    import transformers

    def generate(prompts: Rows, new_tokens: int) -> Rows:
        ids = torch.tensor(prompts, device=model.device)
        config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0, use_cache=True, **options
        )
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return output[:, ids.shape[1] :].tolist()

    return generate


def compiled_loop(model: Any, capacity: int) -> Generate:
    """What a user of transformers can write by hand; the host waits for the last token alone."""
    import torch
    import transformers

    @functools.cache
    def cache_of(batch: int) -> Any:
        """Kept from call to call: a CUDA graph reads fixed addresses."""
        return transformers.StaticCache(config=model.config, max_cache_len=capacity)

    def next_ids(ids: Any, cache: Any) -> Any:
        # With a mask of its own: the model's, in transformers 5.17, needs a tensor constant that is made on the host,
        # and PyTorch makes no CUDA graph of what the host takes part in.
        positions = cache.get_seq_length() + torch.arange(ids.shape[1], device=ids.device)
        is_hidden = torch.arange(capacity, device=ids.device) > positions[:, None]
        mask = is_hidden[None, None] * torch.finfo(model.dtype).min  # [1, 1, T, S]
        logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    step = torch.compile(next_ids, mode="reduce-overhead", dynamic=False)

    def generate(prompts: Rows, new_tokens: int) -> Rows:
        cache = cache_of(len(prompts))
        cache.reset()
        tokens = [next_ids(torch.tensor(prompts, device=model.device), cache)]
        for _ in range(new_tokens - 1):
            torch.compiler.cudagraph_mark_step_begin()
            tokens.append(step(tokens[-1], cache).clone())  # the next replay writes over the graph's output
        return torch.cat(tokens, dim=1).tolist()

    return generate


def agreement(model: Any, task: Task, tokens: Rows) -> dict[str, float]:
    """How greedy tokens stand in one plain pass over prompts and text.

    Raises:
        ValueError: one lies further below the best than rounding explains.
    """
    import torch

    prompts = task.prompts(len(tokens))
    ids = torch.tensor([prompt + row for prompt, row in zip(prompts, tokens, strict=True)], device=model.device)
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=task.new_tokens).logits.float()
    chosen = logits.gather(-1, ids[:, -task.new_tokens :, None])[..., 0]
    best = logits.amax(-1)
    gap = ((best - chosen) / logits.abs().amax(-1)).max().item()
    if not gap <= TIES[task.dtype]:
        raise ValueError(f"a token lies {gap:.3g} of the largest logit below the best, {TIES[task.dtype]} is rounding")
    return {"best_tokens_percent": 100 * (chosen == best).float().mean().item(), "largest_gap": gap}


def child(task: Task) -> None:
    """Prints a line a batch when it is measured, or one that says why there is none."""
    try:
        measure_batch = (prepare_ours if task.system in OUR_MODES else prepare_transformers)(task)
    except Exception as error:
        report({}, error)
        return
    for batch in task.batch:
        try:
            print(json.dumps({"batch": batch} | measure_batch(batch)), flush=True)
        except Exception as error:
            report({"batch": batch}, error)


def report(where: dict[str, Any], error: Exception) -> None:
    """An error as a line of the child, in full on stderr."""
    traceback.print_exception(error)
    print(json.dumps(where | {"error": f"{type(error).__name__}: {one_line(error)}"}), flush=True)


# -- In the parent process --------------------------------------------------------------------------------------------


def run_in_child(task: Task, limit_s: float) -> dict[str, Any]:
    """One system in a process of its own: what it measured within the time, and why not all of it."""
    command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(task))]
    begin = time.perf_counter()
    error = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the compiler's processes
            output, _ = process.communicate()
            error = f"not finished within {limit_s:g} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if error is None and process.returncode != 0:
        error = f"exit code {process.returncode}"
    # Libraries may print too, and what is killed may stop within a line.
    whole = [line for line in output.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]
    lines = [json.loads(line) for line in whole]
    error = next((line["error"] for line in lines if "batch" not in line), error)
    rows = [line for line in lines if "batch" in line]
    return {"rows": rows, "error": error, "wall_s": time.perf_counter() - begin}


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the ratios of Hugging Face's fastest times at their batch to theirs; None where it has none."""
    compared = []
    for row in rows:
        theirs = [other for other in rows if other["system"] in HF_WAYS and other["batch"] == row["batch"]]
        ratios = {
            name: min(other[f"{name}_ms"] for other in theirs) / row[f"{name}_ms"] if theirs else None
            for name in ("step", "call")
        }
        compared.append(row | {f"{name}_ratio": ratio for name, ratio in ratios.items()})
    return compared


def print_table(result: dict[str, Any]) -> None:
    """A line a batch and system, the fastest step first; ratios are to Hugging Face's fastest way."""
    columns = (
        ("batch", "batch", "{}"),
        ("system", "system", "{}"),
        ("first token ms", "first_token_ms", "{:.2f}"),
        ("step ms", "step_ms", "{:.3f}"),
        ("limit", "step_limit_ms", "{:.3f}"),
        ("ratio", "step_ratio", "{:.2f}"),
        ("whole call ms", "call_ms", "{:.1f}"),
        ("tok/s", "call_tokens_per_s", "{:.0f}"),
        ("ratio", "call_ratio", "{:.2f}"),
    )
    title = (
        f"{result['preset']} on {result['environment']['device']}, {result['dtype']}: "
        f"{result['prompt_len']} tokens in, {result['new_tokens']} out"
    )
    table = Table(title=title, box=box.SIMPLE)
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["step_ms"])):
        table.add_row(*("-" if row[key] is None else form.format(row[key]) for _, key, form in columns))
    console = Console(width=130)
    console.print(table)
    for failure in result["failures"]:
        console.print(failure, markup=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems = [*OUR_MODES, *HF_WAYS]
    parser.add_argument("--systems", choices=systems, nargs="+", default=systems, help="what runs, in this order")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="kogpt-6b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset, for a quick look")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=150.0, help="seconds that a system has for all batches")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    max_len = PRESETS[arguments.preset].max_len
    if arguments.new_tokens <= FEW_TOKENS:
        parser.error(f"--new-tokens must be more than {FEW_TOKENS}, got {arguments.new_tokens}")
    if arguments.prompt_len + arguments.new_tokens > max_len:
        parser.error(
            f"--prompt-len {arguments.prompt_len} and --new-tokens {arguments.new_tokens} are more than the context, "
            f"{max_len} tokens"
        )
    for name in ("batch", "prompt_len", "repeats", "layers", "limit_s"):
        value = getattr(arguments, name)
        least = min(value) if isinstance(value, list) else value
        if least is not None and not 0 < least < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, got {least}")
    if arguments.out is not None:
        try:
            check_writable(arguments.out)
        except InputError as error:
            parser.error(f"--out: {error}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    setting = {name: value for name, value in vars(arguments).items() if name not in ("systems", "limit_s", "out")}
    tasks = [Task(system=system, **setting) for system in dict.fromkeys(arguments.systems)]
    outputs = {}
    for task in tasks:
        outputs[task.system] = run_in_child(task, arguments.limit_s)
        print(f"{task.system}: {outputs[task.system]['wall_s']:.0f} s", file=sys.stderr)
    # Here, when the device's memory is free again.
    bandwidth = read_bandwidth(2**28 if jax.default_backend() == "cpu" else 2**32)
    context = arguments.prompt_len + (FEW_TOKENS + arguments.new_tokens) / 2
    rows = [
        {"system": task.system}
        | row
        | {"step_limit_ms": 1e3 * step_bytes(task.config, row["batch"], context) / bandwidth}
        for task in tasks
        for row in outputs[task.system]["rows"]
        if "error" not in row
    ]
    failures = [
        f"{system}{where}: {error}"
        for system, output in outputs.items()
        for where, error in [
            ("", output["error"]),
            *((f", batch {row['batch']}", row.get("error")) for row in output["rows"]),
        ]
        if error is not None
    ]
    result = setting | {
        "limit_s": arguments.limit_s,
        "read_bytes_per_s": bandwidth,
        "rows": compare(rows),
        "failures": failures,
        "wall_s": {system: output["wall_s"] for system, output in outputs.items()},
        "environment": environment(),
    }
    print_table(result)
    write_result(arguments.out, result)
    measured = {(row["system"] in HF_WAYS, row["batch"]) for row in rows}
    return 0 if len(measured) == 2 * len(set(arguments.batch)) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Task(**json.loads(sys.argv[2])))
    else:
        sys.exit(main())
