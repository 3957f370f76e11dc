"""What does deterministic mode cost, and what differs without it?

Both modes over the same random weights, with the same largest batch, through the public API:

    python benchmarks/bench_deterministic.py --batch 1 64 --random-batches 0 --json out.json
    python benchmarks/bench_deterministic.py --preset demo --dtype fp32 --batch 1 8 --prompt-len 64

Times are those of `bench_generate.py`: prefill and first token, and a decode step. Then rows run in random batches, and
each is compared with itself alone, bit for bit: the log-probability of its first token, which prefill decides, those of
the tokens that decode steps add, its tokens, and its scores. The digest is of all rows alone: where two runs have the
same one, they agree in every bit.
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import numpy as np
from bench_generate import add_model_arguments, make_model, measure
from environment import environment, write_result

from kogpt_jax import Completion, KoGPT, SamplingParams, Score

NUM_ROWS = 12
NEW_TOKENS = 9
NAMES = {False: "ordinary", True: "deterministic"}


def differences(model: KoGPT, prompt_len: int, num_batches: int) -> dict[str, Any]:
    """How many rows of random batches are not what they are alone; half of the rows are drawn."""
    rng = np.random.default_rng(0)
    lens = rng.integers(2, prompt_len + 1, NUM_ROWS)
    rows = [rng.integers(5, model.config.vocab_size, length).tolist() for length in lens]
    params = [
        SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=index % 2, top_p=0.9, seed=index)
        for index in range(NUM_ROWS)
    ]
    alone = [model.generate_ids([row], one)[0] for row, one in zip(rows, params, strict=True)]
    scores = [model.score_ids([row])[0] for row in rows]
    counts = dict.fromkeys(("rows", "first_logprob", "later_logprobs", "tokens", "scores"), 0)
    for _ in range(num_batches):
        chosen = rng.permutation(NUM_ROWS)[: rng.integers(2, NUM_ROWS + 1)]
        completions = model.generate_ids([rows[index] for index in chosen], [params[index] for index in chosen])
        scored = model.score_ids([rows[index] for index in chosen])
        for index, completion, score in zip(chosen, completions, scored, strict=True):
            counts["rows"] += 1
            for name, is_other in compare(completion, alone[index], score, scores[index]).items():
                counts[name] += is_other
    bits = b"".join(np.array([*row.token_ids, *row.logprobs], np.float64).tobytes() for row in alone)
    bits += b"".join(np.array(score.logprobs[1:], np.float64).tobytes() for score in scores)
    return counts | {"sha256_alone": hashlib.sha256(bits).hexdigest()}


def compare(row: Completion, alone: Completion, score: Score, score_alone: Score) -> dict[str, bool]:
    """What of a row is other than alone."""
    return {
        "first_logprob": row.logprobs[0] != alone.logprobs[0],
        "later_logprobs": row.logprobs[1:] != alone.logprobs[1:],
        "tokens": row.token_ids != alone.token_ids,
        "scores": score != score_alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--random-batches", type=int, default=20, help="batches in which rows are compared; 0: none")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    arguments = parser.parse_args()

    most = max(arguments.batch)
    ordinary = make_model(arguments, most)
    options: dict[str, Any] = {"max_batch_size": most, "implementation": arguments.implementation}
    models = {
        False: ordinary,
        True: KoGPT(ordinary.config, ordinary.leaves, ordinary.mesh, deterministic=True, **options),
    }
    rows, compared = [], {}
    load_before = os.getloadavg()[0]
    for batch in arguments.batch:
        for deterministic, model in models.items():  # in turn, so that what else the machine does meets both
            row = measure(model, batch, arguments.prompt_len, "greedy", arguments.repeats)
            names = ("batch", "prompt_len", "prefill_ms", "step_ms", "tokens_per_s", "first_call_s")
            rows.append({"mode": NAMES[deterministic]} | {name: row[name] for name in names})
            print(
                f"{NAMES[deterministic]:13}  batch {batch:3}  first tokens {row['prefill_ms']:9.2f} ms  "
                f"step {row['step_ms']:8.3f} ms  {row['tokens_per_s']:8.1f} tokens/s",
                flush=True,
            )
    for deterministic, model in models.items() if arguments.random_batches else ():
        found = differences(model, arguments.prompt_len, arguments.random_batches)
        compared[NAMES[deterministic]] = found
        print(f"{NAMES[deterministic]:13}  other than alone, of {found['rows']} rows: {found}", flush=True)
    result = {
        "preset": arguments.preset,
        "num_layers": ordinary.config.num_layers,
        "dtype": ordinary.config.dtype,
        "quant": ordinary.config.quant,
        "max_batch_size": most,
        "ops": {NAMES[deterministic]: dataclasses.asdict(model.ops) for deterministic, model in models.items()},
        "rows": rows,
        "other_than_alone": compared,
        "load_average": [load_before, os.getloadavg()[0]],  # above what one process makes: the machine was shared
        "environment": environment(),
    }
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
