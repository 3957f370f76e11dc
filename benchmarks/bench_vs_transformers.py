"""Are we at least as fast as Hugging Face transformers on a CPU? Greedy text of the demo model, both in fp32.

    python benchmarks/bench_vs_transformers.py --out cpu.json

Each system runs in its own process, pinned to the same cores, so that their threads never meet. Hugging Face runs in
several ways and the fastest counts for it. The token ids of both must be equal. Needs the extra ``oracle``. Exit code 1
where ours is slower anywhere or the text differs.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

OURS = "kogpt_jax"
HF_VARIANTS = ("generate", "generate_static_cache", "bare_loop")
# So that the rows of a batch differ. Each is cut to the same number of tokens: Hugging Face then needs no padding.
TEXTS = (
    "대한민국의 수도는 서울이며 인구가 가장 많은 도시이다. 서울은 한강을 끼고 있으며 오랜 역사를 가지고 있다.",
    "오늘 아침에 일어나서 창문을 열었더니 하늘이 맑고 바람이 시원했다. 나는 천천히 길을 걷기 시작했다.",
    "과학자들은 새로운 방법으로 물질의 구조를 연구하고 있으며 그 결과는 여러 분야에서 쓰이고 있다.",
    "옛날 어느 마을에 마음씨 착한 농부가 살고 있었는데 그는 날마다 산에 올라가 나무를 하였다.",
    "조선 시대의 왕은 신하들과 함께 나라의 중요한 일을 의논하였고 백성들의 말을 듣고자 하였다.",
    "이 소설은 전쟁이 끝난 뒤에 고향으로 돌아온 한 젊은이의 이야기를 담고 있으며 널리 읽혔다.",
    "경제가 성장하면서 많은 사람들이 도시로 이동하였고 그에 따라 주택과 교통의 문제가 생겨났다.",
    "바다에서 잡은 물고기는 시장에서 팔리거나 말려서 겨울 동안의 음식으로 쓰이는 일이 많았다.",
)
# Where the two best logits are this close, relative to the largest, f32 decides nothing and the texts may part.
TIE = 1e-5
NUM_READS = 20
# With other processes on the cores, PyTorch's threads wait for one another ten times longer than they compute.
BUSY_LOAD = 0.7


@dataclasses.dataclass(frozen=True)
class Workload:
    """What each system runs."""

    model_dir: str
    prompts: list[list[int]]  # as many as the largest batch
    batches: list[int]
    new_tokens: int
    repeats: int
    cores: list[int]  # as many threads as cores


# -- In the child processes -------------------------------------------------------------------------------------------


def median_ms(run: Callable[[], Any], repeats: int) -> tuple[float, list[float]]:
    """The median wall time of ``repeats`` runs after two for warming up (compilation, caches), and all of them."""
    for _ in range(2):
        run()
    times_ms = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times_ms), times_ms


def measure(generate: Callable[[list[list[int]], int], list[list[int]]], workload: Workload) -> list[dict[str, Any]]:
    """Times ``generate(prompts, new_tokens) -> new token ids`` for each batch, the first token apart from the rest."""
    results = []
    for batch in workload.batches:
        prompts = workload.prompts[:batch]
        first_ms, _ = median_ms(functools.partial(generate, prompts, 1), workload.repeats)
        total_ms, all_ms = median_ms(functools.partial(generate, prompts, workload.new_tokens), workload.repeats)
        results.append(
            {
                "batch": batch,
                "total_ms": total_ms,
                "all_ms": all_ms,
                "first_token_ms": first_ms,
                "decode_step_ms": (total_ms - first_ms) / (workload.new_tokens - 1),
                "tokens_per_s": batch * workload.new_tokens / total_ms * 1e3,
                "tokens": generate(prompts, workload.new_tokens),
            }
        )
    return results


def run_ours(workload: Workload) -> dict[str, Any]:
    from kogpt_jax import KoGPT, SamplingParams

    engine = KoGPT.from_pretrained(workload.model_dir, dtype="fp32")

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        return [list(completion.token_ids) for completion in engine.generate_ids(prompts, params)]

    return {"results": measure(generate, workload)}


def run_transformers(workload: Workload, variant: str) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(len(workload.cores))
    model = transformers.GPTJForCausalLM.from_pretrained(
        workload.model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None  # `generate` falls back to it where its caller says None

    def config(new_tokens: int, **options: Any) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0, use_cache=True, **options
        )

    def with_generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"cache_implementation": "static"} if variant == "generate_static_cache" else {}
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config(new_tokens, **options)
        )
        return output[:, ids.shape[1] :].tolist()

    def with_bare_loop(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        cache = transformers.DynamicCache(config=model.config)
        tokens = []
        for _ in range(new_tokens):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
        return torch.cat(tokens, dim=1).tolist()

    def gaps(prompts: list[list[int]]) -> list[list[float]]:
        """Top-1 minus top-2 logit of each step, relative to the largest magnitude."""
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config(workload.new_tokens, output_logits=True, return_dict_in_generate=True),
        )
        logits = torch.stack(output.logits, dim=1)
        top = logits.topk(2).values
        return ((top[..., 0] - top[..., 1]) / logits.abs().amax(-1)).tolist()

    with torch.inference_mode():
        results = measure(with_bare_loop if variant == "bare_loop" else with_generate, workload)
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        return {"results": results, "gaps": gaps(workload.prompts), "weight_bytes": weight_bytes}


# -- In the parent process --------------------------------------------------------------------------------------------


def run_in_child(system: str, workload: Workload) -> dict[str, Any]:
    """Runs one system in a process of its own."""
    threads = str(len(workload.cores))
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    process = subprocess.run(
        [sys.executable, __file__, "--child", system],
        input=json.dumps(dataclasses.asdict(workload)),
        stdout=subprocess.PIPE,
        env=variables,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def read_rate(num_bytes: int, num_threads: int) -> float:
    """Bytes a second at which the threads together read an array of this size again and again, caches included."""
    import numpy as np

    parts = [np.ones(num_bytes // num_threads // 4, np.float32) for _ in range(num_threads)]

    def read(part: "np.ndarray") -> None:
        for _ in range(NUM_READS):
            part.max()

    best_s = float("inf")
    for _ in range(3):
        threads = [threading.Thread(target=read, args=(part,)) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best_s = min(best_s, time.perf_counter() - start)
    return NUM_READS * sum(part.nbytes for part in parts) / best_s


def first_difference(ours: list[int], theirs: list[int], gaps: list[float]) -> str | None:
    """What is wrong where two texts part other than at a tie."""
    for step, (our_token, their_token) in enumerate(zip(ours, theirs, strict=True)):
        if our_token != their_token:
            return None if gaps[step] <= TIE else f"step {step}: {our_token} instead of {their_token}, gap {gaps[step]}"
    return None


def print_table(rows: list[dict[str, Any]], fastest: dict[int, dict[str, Any]], roofline_step_ms: float) -> None:
    """One line a batch and system; the ratio is the time of Hugging Face's fastest way over this one's."""
    print(
        f"{'batch':>5} {'system':<34} {'total ms':>9} {'tok/s':>8} {'first ms':>9} {'step ms':>8} {'roofline':>9} ratio"
    )
    for row in sorted(rows, key=lambda row: (row["batch"], row["total_ms"])):
        ratio = fastest[row["batch"]]["total_ms"] / row["total_ms"]
        print(
            f"{row['batch']:>5} {row['system']:<34} {row['total_ms']:>9.1f} {row['tokens_per_s']:>8.0f} "
            f"{row['first_token_ms']:>9.2f} {row['decode_step_ms']:>8.3f} {roofline_step_ms:>9.3f} {ratio:.2f}"
        )


def compare(outputs: dict[str, dict[str, Any]], workload: Workload) -> dict[str, Any]:
    """Prints the table and gives the part of the report that the children's outputs decide."""
    rows = [{"system": system, **result} for system, output in outputs.items() for result in output["results"]]
    fastest = {
        batch: min(
            (row for row in rows if row["batch"] == batch and row["system"] != OURS), key=lambda row: row["total_ms"]
        )
        for batch in workload.batches
    }
    hf_output = next(output for system, output in outputs.items() if system != OURS)
    weight_bytes = hf_output["weight_bytes"]
    os.sched_setaffinity(0, workload.cores)
    roofline_step_ms = weight_bytes / read_rate(weight_bytes, len(workload.cores)) * 1e3
    print_table(rows, fastest, roofline_step_ms)
    differences = [
        f"batch {row['batch']} row {index} of {row['system']}: {difference}"
        for row in rows
        for index, (tokens, expected) in enumerate(zip(row["tokens"], fastest[row["batch"]]["tokens"], strict=True))
        if (difference := first_difference(tokens, expected, hf_output["gaps"][index])) is not None
    ]
    return {
        "ratio_by_batch": {
            row["batch"]: fastest[row["batch"]]["total_ms"] / row["total_ms"] for row in rows if row["system"] == OURS
        },
        "differences": differences,
        "weight_bytes": weight_bytes,
        "roofline_step_ms": roofline_step_ms,
        "results": [{key: value for key, value in row.items() if key != "tokens"} for row in rows],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo' or a Hugging Face directory with a tokenizer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=HF_VARIANTS, default=HF_VARIANTS, help="Hugging Face's ways")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    if args.threads > len(os.sched_getaffinity(0)):
        parser.error(f"--threads {args.threads}, but this process may use {len(os.sched_getaffinity(0))} cores")
    if not 1 <= min(args.batches) <= max(args.batches) <= len(TEXTS):
        parser.error(f"--batches must lie between 1 and {len(TEXTS)}, got {args.batches}")
    return args


def main() -> int:
    args = parse_arguments()

    import jax
    from environment import environment

    from kogpt_jax import demo
    from kogpt_jax.tokenizer import load_tokenizer

    jax.config.update("jax_platforms", "cpu")
    model_dir = str(demo.DIRECTORY) if args.model == "demo" else args.model
    tokenizer = load_tokenizer(model_dir)
    prompts = [tokenizer.encode(text)[: args.prompt_tokens] for text in TEXTS[: max(args.batches)]]
    shortest = min(len(prompt) for prompt in prompts)
    if shortest < args.prompt_tokens:
        print(f"--prompt-tokens {args.prompt_tokens}, but a text has only {shortest} tokens", file=sys.stderr)
        return 2
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    workload = Workload(model_dir, prompts, args.batches, args.new_tokens, args.repeats, cores)
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        print(f"load average {load:.1f}: other processes are running, these times say little", file=sys.stderr)
    outputs = {OURS: run_in_child(OURS, workload)}
    outputs |= {f"transformers {variant}": run_in_child(variant, workload) for variant in args.variants}
    comparison = compare(outputs, workload)
    if args.out is not None:
        arguments = {name: value for name, value in vars(args).items() if name != "out"}
        setting = arguments | {"dtype": "fp32", "load_average": load}
        report = {"environment": environment(), "workload": setting, **comparison}
        args.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    problems = comparison["differences"] + [
        f"batch {batch}: only {ratio:.2f} times as fast as transformers"
        for batch, ratio in comparison["ratio_by_batch"].items()
        if ratio < 1
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def child(system: str) -> None:
    """Reads the workload from stdin; the last line of stdout is the result."""
    workload = Workload(**json.load(sys.stdin))
    os.sched_setaffinity(0, workload.cores)  # before any library counts the cores to size its thread pools
    output = run_ours(workload) if system == OURS else run_transformers(workload, system)
    print(json.dumps(output))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        sys.exit(main())
