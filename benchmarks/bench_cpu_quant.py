"""How much faster is a decode step on a CPU with INT8 weights through the Host library than in fp32 through XLA?

A GPT-J of random weights that is too big for the CPU's cache, fp32 activations; the variants in turn in one process, so
that what else the machine does meets them all. A step is (time of 73 new tokens - time of 9) / 64, medians; beside it
the rate at which weights, as they are stored, and keys and values are read:

    python benchmarks/bench_cpu_quant.py --json benchmarks/results/cpu_quant.json
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import time

import jax
from bench_generate import FEW_TOKENS, MANY_TOKENS, PRESETS, SAMPLING, num_parameters, prompts, step_bytes
from environment import environment, write_result

from kogpt_jax import KoGPT
from kogpt_jax.config import Quant
from kogpt_jax.ops import Choice

# The first is what the others are compared with.
VARIANTS: dict[str, tuple[Quant, Choice]] = {
    "fp32 XLA": ("none", "reference"),
    "fp32 Host": ("none", "ffi"),
    "w8a16 XLA": ("w8a16", "reference"),
    "w8a16 Host": ("w8a16", "ffi"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="gptj-350m")
    parser.add_argument("--variants", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    arguments = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    config = dataclasses.replace(PRESETS[arguments.preset], dtype="fp32", eos_token_ids=())
    models = {}
    for name in arguments.variants:
        quant, implementation = VARIANTS[name]
        models[name] = KoGPT.from_random(dataclasses.replace(config, quant=quant), implementation=implementation)
    print(f"{num_parameters(config) / 1e6:.0f} million parameters")
    rows = []
    for batch in arguments.batch:
        tokens = prompts(config, batch, arguments.prompt_len)

        def generate(model: KoGPT, max_new_tokens: int, tokens: list[list[int]] = tokens) -> float:
            begin = time.perf_counter()
            model.generate_ids(tokens, dataclasses.replace(SAMPLING["greedy"], max_new_tokens=max_new_tokens))
            return time.perf_counter() - begin

        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for model in models.values():
            generate(model, MANY_TOKENS)
        for _ in range(arguments.repeats):
            for name, model in models.items():
                times[name].append((generate(model, FEW_TOKENS), generate(model, MANY_TOKENS)))
        context = arguments.prompt_len + (FEW_TOKENS + MANY_TOKENS) / 2
        for name, model in models.items():
            few, many = (statistics.median(column) for column in zip(*times[name], strict=True))
            step_ms = 1e3 * (many - few) / (MANY_TOKENS - FEW_TOKENS)
            gbytes_per_s = step_bytes(model.config, batch, context) / step_ms / 1e6
            rows.append({"variant": name, "batch": batch, "step_ms": step_ms, "gbytes_per_s": gbytes_per_s})
        first = next(row["step_ms"] for row in rows if row["batch"] == batch)
        for row in rows[-len(models) :]:
            row["speedup"] = first / row["step_ms"]
            print(
                f"batch {batch:2}  {row['variant']:12} {row['step_ms']:8.2f} ms a step  "
                f"reads {row['gbytes_per_s']:5.1f} GB/s  {row['speedup']:.2f}x"
            )
    result = {
        "preset": arguments.preset,
        "parameters": num_parameters(config),
        "threads": len(os.sched_getaffinity(0)),
        "rows": rows,
        "environment": environment(),
    }
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
