"""Makes tests/goldens with Hugging Face's GPT-J in f32: ``python tests/make_goldens.py`` (needs the extra ``oracle``).

Each prompt runs alone, without padding, with eager attention and Hugging Face's own KV cache and greedy search. Only
outputs are stored; ``hash_weights`` makes the weights again wherever the tests run.
"""

import hashlib
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import tolerances
import torch
import transformers
from golden_cases import CASES, GOLDENS, NEW_TOKENS, GoldenCase


def load(directory: pathlib.Path) -> transformers.GPTJForCausalLM:
    """Hugging Face's model in f32, whatever dtype is stored; every key must be used and every parameter filled."""
    model, info = transformers.GPTJForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise RuntimeError(f"Hugging Face does not take the checkpoint as it is: {problems}")
    model.generation_config.eos_token_id = None  # `generate` falls back to it where its caller says None
    return model.eval()


def greedy(
    model: transformers.GPTJForCausalLM, prompt: list[int], max_new_tokens: int, eos: object
) -> dict[str, np.ndarray]:
    """Greedy continuation of one prompt: ids, log-probabilities, top-1 minus top-2 logit over the largest magnitude."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=0,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    tokens = output.sequences[0, len(prompt) :]
    logits = torch.stack(output.logits)[:, 0].double()
    top = logits.topk(2).values
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logprobs": logprobs.numpy().astype(np.float32),
        "gaps": ((top[:, 0] - top[:, 1]) / logits.abs().amax(1)).numpy().astype(np.float32),
    }


def make(case: GoldenCase) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of one golden and its entry in the manifest; refuses a golden that would show little."""
    with tempfile.TemporaryDirectory() as scratch:
        digest = case.write(pathlib.Path(scratch))
        model = load(pathlib.Path(scratch))
    arrays: dict[str, Any] = {}
    distinct, smallest_gap, ends, stds, entropies = [], np.inf, [], [], []
    for index, prompt in enumerate(case.prompts()):
        output = model(torch.tensor([prompt]), output_attentions=True)
        arrays[f"logits_{index}"] = output.logits[0, case.logit_positions(len(prompt))].numpy()
        stds.append(output.logits.std().item())
        if len(prompt) == 64:  # entropy of the last query's attention against that of uniform attention
            last = torch.stack([a[0, :, -1] for a in output.attentions])
            entropies.append((-(last * last.clamp_min(1e-30).log()).sum(-1) / np.log(64)).mean().item())
        run = greedy(model, prompt, case.max_new_tokens(len(prompt)), None)
        arrays |= {f"{name}_{index}": value for name, value in run.items()}
        distinct.append(len(set(run["tokens"].tolist())))
        smallest_gap = min(smallest_gap, float(run["gaps"].min()))
        if case.eos_token_id is not None:
            eos = case.hf_config()["eos_token_id"]
            stopped = greedy(model, prompt, case.max_new_tokens(len(prompt)), eos)["tokens"]
            arrays[f"tokens_until_eos_{index}"] = stopped
            ends.append(int(stopped[-1]))
    summary = {
        "weights_sha256": digest,
        "logits_std": round(float(np.mean(stds)), 2),
        "attention_entropy": [round(e, 2) for e in entropies],
        "mean_distinct_tokens": round(float(np.mean(distinct)), 1),
        "smallest_gap": float(f"{smallest_gap:.1e}"),
    }
    print(case.name, summary, ends)
    if np.mean(distinct) < 10:
        raise RuntimeError(f"{case.name}: greedy text is a loop, {summary}")
    if not smallest_gap > tolerances.TIE:
        raise RuntimeError(f"{case.name}: a step of the greedy text is a tie, {summary}")
    if case.eos_token_id is not None:
        eos_ids = set(np.atleast_1d(case.eos_token_id).tolist())
        if not (eos_ids <= set(ends) and any(end not in eos_ids for end in ends)):
            raise RuntimeError(
                f"{case.name}: needs a row that each of {eos_ids} ends and one that none ends, got {ends}"
            )
    return arrays, summary


def main() -> None:
    torch.set_num_threads(1)  # one order of summation
    GOLDENS.mkdir(exist_ok=True)
    manifest: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "new_tokens": NEW_TOKENS,
        "cases": {},
    }
    with torch.inference_mode():
        for case in CASES:
            arrays, summary = make(case)
            path = GOLDENS / f"{case.name}.npz"
            np.savez_compressed(path, **arrays)
            manifest["cases"][case.name] = {**summary, "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (GOLDENS / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    total_bytes = sum(path.stat().st_size for path in GOLDENS.iterdir())
    print(f"{total_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
