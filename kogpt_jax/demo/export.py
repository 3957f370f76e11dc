"""From finished training runs to the directory that ships: weights in Hugging Face layout, model card, figures."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kogpt_jax import checkpoint
from kogpt_jax.config import ModelConfig
from kogpt_jax.demo import data
from kogpt_jax.errors import InputError
from kogpt_jax.json_files import read_json_object
from kogpt_jax.model import model_def
from kogpt_jax.sharding import make_mesh, named_sharding

RUN_FILE = "training.json"
WEIGHTS_FILE = "weights.npz"
FIGURES_FILE = "demo_training.json"
CARD_FILE = "README.md"

# Two shards for the demo model, so that the files that ship are read the way large checkpoints are.
_MAX_SHARD_BYTES = 12_000_000


def write_run(
    run_directory: pathlib.Path, result: Mapping[str, Any], arrays: Mapping[str, Array], config: ModelConfig
) -> None:
    """Writes ``training.json`` and ``weights.npz``, leaves by path, into an existing directory."""
    dtype = config.jax_dtype
    # As raw bytes: NumPy's file format has no bfloat16.
    weights = {path: np.asarray(array.astype(dtype)).view(np.uint8) for path, array in arrays.items()}
    np.savez(run_directory / WEIGHTS_FILE, **weights)  # type: ignore[arg-type]  # keywords are arrays here
    text = json.dumps({**result, "dtype": config.dtype}, indent=1, ensure_ascii=False)
    (run_directory / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def export(
    runs: Sequence[pathlib.Path],
    directory: pathlib.Path,
    out: pathlib.Path,
    tokenizer_file: pathlib.Path,
    baseline: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Writes the best of ``runs`` on validation as a model directory with its card and figures.

    The held-out lines are measured here and nowhere else: once, on the weights as stored, computing in f32.

    Args:
        runs: folders that `train` wrote.
        directory: the token streams.
        out: does not exist yet, or is empty.
        tokenizer_file: copied beside the weights.
        baseline: JSON of ``benchmarks/char_ngram.py``, named in the card.

    Returns:
        What ``demo_training.json`` holds.
    """
    results = {run: read_json_object(run / RUN_FILE) for run in runs}
    best = min(results, key=lambda run: results[run]["validation_bits_per_char"])
    figures = results[best]
    config = ModelConfig.from_hf_dict(figures["model"], dtype=figures["dtype"], source=str(best / RUN_FILE))
    definition, mesh = model_def(config), make_mesh()
    with np.load(best / WEIGHTS_FILE) as weights:
        arrays = {path: weights[path].view(config.jax_dtype) for path in weights.files}
    leaves = [
        jax.device_put(arrays[param.path].reshape(param.shape), named_sharding(mesh, param.logical_axes))
        for param in definition.params
    ]
    streams, facts = data.load(directory)
    if facts != figures["data"]:
        raise InputError(f"{directory} holds other data than {best} was trained on")
    in_f32 = model_def(ModelConfig.from_hf_dict(figures["model"], dtype="fp32"))
    heldout = data.measure(
        [leaf.astype(jnp.float32) for leaf in leaves], in_f32, mesh, streams["heldout"], facts["heldout"]["characters"]
    )
    figures["parameters"] = sum(leaf.size for leaf in leaves)
    figures["weight_bytes"] = sum(leaf.nbytes for leaf in leaves)
    figures["heldout"] = {
        "documents": heldout.documents,
        "tokens": heldout.tokens,
        "characters": heldout.characters,
        "bits_per_char": round(heldout.bits_per_char, 4),
        "perplexity": round(heldout.perplexity, 2),
    }
    figures["runs_compared"] = [
        {
            "settings": result["settings"],
            "best_step": result["best_step"],
            "validation_bits_per_char": round(result["validation_bits_per_char"], 5),
        }
        for result in results.values()
    ]
    baseline_bits = None if baseline is None else read_json_object(baseline)["heldout"]["bits_per_char"]
    checkpoint.save_pretrained(out, config, leaves, max_shard_bytes=_MAX_SHARD_BYTES, tokenizer_files=[tokenizer_file])
    figures["weights_sha256"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.glob("*.safetensors"))
    }
    (out / FIGURES_FILE).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / CARD_FILE).write_text(model_card(figures, baseline_bits), encoding="utf-8")
    return figures


def model_card(figures: Mapping[str, Any], baseline_bits: float | None) -> str:
    """The card's text; its figures come from the run, so that none is copied by hand."""
    model, settings, facts, heldout = (figures[name] for name in ("model", "settings", "data", "heldout"))
    train = facts["train"]
    versus = ""
    if baseline_bits is not None:
        versus = (
            " A character 5-gram model with modified Kneser-Ney smoothing, trained on the same text, takes"
            f" {baseline_bits:.3f} (`benchmarks/char_ngram.py`)."
        )
    return f"""---
language: ko
license: cc0-1.0
library_name: kogpt-jax
pipeline_tag: text-generation
---
# Demo model

A small Korean language model with GPT-J's architecture, so that all of `kogpt_jax` can be tried, tested and measured
without a download: `KoGPT.from_pretrained("demo")`, `kogpt generate --model demo`. It writes film reviews, and has read
one statute. It knows nothing: do not use its text as information.

| | |
|---|---|
| Architecture | GPT-J: {model["n_layer"]} layers, width {model["n_embd"]}, {model["n_head"]} heads of \
{model["n_embd"] // model["n_head"]}, rotary on {model["rotary_dim"]}, FFN {model["n_inner"]}, \
context {model["n_positions"]} tokens |
| Parameters | {figures["parameters"]:,} |
| Weights | {model["torch_dtype"]} safetensors in two shards with an index, \
{figures["weight_bytes"] / 1e6:.1f} MB, Hugging Face layout |
| Tokenizer | SentencePiece unigram, {model["vocab_size"]} pieces, byte fallback, no normalisation; \
[BOS] 0, [EOS] 1, [UNK] 2, [PAD] 3, [MASK] 4 |
| Training | {settings["steps"]:,} steps of {settings["batch"]} x {settings["row_len"]} tokens \
({figures["epochs"]:.1f} passes), {figures["seconds"] / 60:.1f} minutes on one {figures["device"]} |
| Kept | averaged weights of step {figures["best_step"]:,}, the best on validation |
| Held-out perplexity | {heldout["perplexity"]:.2f} a token |
| Held-out bits per character | {heldout["bits_per_char"]:.3f} |

## Data
* 317,642 Korean film reviews: Naver sentiment movie corpus v1.0 (repository `e9t/nsmc`, commit `cc0670e8`), CC0 1.0.
  Ratings of 8 and over, 15 characters and over, at least 60 % Hangul syllables, without links and coarse words, without
  duplicates. Its bias follows from that: praise, spelt as people type.
* The Constitution of the Republic of Korea, seen four times a pass. Public domain: statutes are not protected under
  Korean copyright law, article 7.

The text is not part of this repository. Trained on: {train["documents"]:,} documents, {train["tokens"]:,} tokens. \
Settings and step were chosen on {facts["validation"]["documents"]:,} more reviews. \
The {heldout["documents"]:,} held-out reviews chose nothing; these weights were measured on them for the figures here.
`benchmarks/results/{FIGURES_FILE}` has every setting, the course of the run and SHA-256 digests of the data.

## How held-out text is measured
Each line by itself: the sum of -log2 p over its tokens and the [EOS] behind it, in f32 from the weights as shipped,
divided by its characters plus one for the line's end ({heldout["characters"]:,} in all). Before the first token stands
one [EOS], as between documents in training.{versus}

## Use
Nothing stands in front of a prompt; [EOS] ends the text. [BOS], [UNK], [PAD] and [MASK] have KoGPT's names but occur
nowhere in training. Documents are short, a few dozen tokens; what follows an [EOS] (`ignore_eos`) is another review.

## Make it anew
```
pip install .[train]
python -m kogpt_jax.demo.train tokenizer --corpus CORPUS --out kogpt_jax/demo/tokenizer.model
python -m kogpt_jax.demo.train prepare --corpus CORPUS --out .demo_data
python -m kogpt_jax.demo.train model --data .demo_data --out .demo_data/run --steps {settings["steps"]} \\
    --learning-rate {settings["learning_rate"]} --weight-decay {settings["weight_decay"]} \\
    --dropout {settings["dropout"]} --seed {settings["seed"]}
python -m kogpt_jax.demo.train export .demo_data/run --data .demo_data --out .demo_data/demo \\
    --baseline benchmarks/results/char_ngram.json
```
The tokenizer comes out bit for bit, the weights up to what another GPU or compiler rounds differently.

## Licence
Weights, tokenizer and this card: [CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/), as the reviews they
were learnt from. The code is Apache-2.0.
"""
