"""What does INT8 cost the demo model? Held-out perplexity and agreement with fp32 under teacher forcing.

Both models read the held-out lines and predict each token from those before it; agreement is the share of tokens that
both find the likeliest. Lines as for the model card (`kogpt_jax.demo.data`):

    python benchmarks/demo_quantized.py --corpus CORPUS --json benchmarks/results/demo_quantized.json
    python benchmarks/demo_quantized.py --corpus CORPUS --quants w8a8
"""

import argparse
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment, write_result
from jaxtyping import Array

from kogpt_jax import KoGPT, decoding
from kogpt_jax.config import DTYPES, QUANTS, Dtype, Quant
from kogpt_jax.demo import DIRECTORY, data
from kogpt_jax.packing import pack_whole

BATCH = 64


def compare(reference: KoGPT, model: KoGPT, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Perplexity of both over the tokens after each row's first, and how many they agree on."""
    rows = sorted(rows, key=len)
    totals = np.zeros(3)
    num_tokens = 0
    for first in range(0, len(rows), BATCH):
        group = rows[first : first + BATCH]
        # As many rows, or the last group compiles anew.
        chunks = pack_whole(group + [[]] * (BATCH - len(group)), num_shards=1, num_chunks=1)
        is_predicted = np.zeros(chunks.tokens.shape[1], bool)
        for begin, row in zip(chunks.begins[0], group, strict=False):
            is_predicted[begin : begin + len(row) - 1] = True
        logits = [decoding.all_logits(engine.leaves, chunks, **engine._static)[0] for engine in (reference, model)]
        totals += np.asarray(_sums(*logits, chunks.tokens[0], jnp.asarray(is_predicted)), np.float64)
        num_tokens += int(is_predicted.sum())
    nats, model_nats, agreeing = totals / num_tokens
    return {
        "tokens": num_tokens,
        "perplexity_fp32": math.exp(nats),
        "perplexity": math.exp(model_nats),
        "perplexity_percent_more": 100 * math.expm1(model_nats - nats),
        "agreement": agreeing,
    }


@jax.jit
def _sums(logits: Array, other: Array, tokens: Array, is_predicted: Array) -> Array:
    """Negative log-probabilities of the tokens that follow, by both, and the number of tokens that both like best."""
    targets = jnp.roll(tokens, -1)[:, None]

    def nats(logits: Array) -> Array:
        logprobs = jnp.take_along_axis(logits, targets, axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        return -jnp.sum(jnp.where(is_predicted, logprobs, 0))

    agrees = jnp.argmax(logits, axis=-1) == jnp.argmax(other, axis=-1)
    return jnp.stack([nats(logits), nats(other), jnp.sum(agrees & is_predicted).astype(jnp.float32)])


def heldout_rows(corpus: pathlib.Path, reference: KoGPT) -> list[list[int]]:
    """[EOS], a held-out line, [EOS]: as in training."""
    assert reference.tokenizer is not None
    lines = data.read_lines(corpus / data.HELDOUT_FILE)
    return [[data.EOS_ID, *reference.tokenizer.encode(line), data.EOS_ID] for line in lines]


def run(corpus: pathlib.Path, dtypes: Sequence[Dtype], quants: Sequence[Quant] = ("w8a16",)) -> dict[str, Any]:
    reference = KoGPT.from_pretrained("demo", dtype="fp32")
    rows = heldout_rows(corpus, reference)
    results: dict[str, Any] = {}
    for quant in quants:
        results[quant] = {}
        for dtype in dtypes:
            model = KoGPT.from_pretrained("demo", dtype=dtype, quant=quant, keep_quantized=False)
            results[quant][dtype] = compare(reference, model, rows)
            print(quant, dtype, json.dumps(results[quant][dtype]))
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in DIRECTORY.glob("*.safetensors")}
    return {"documents": len(rows), **results, "weights_sha256": weights, "environment": environment()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True, help="folder of the corpus' text files")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--quants", choices=QUANTS, nargs="+", default=["w8a16"])
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    arguments = parser.parse_args()
    result = run(arguments.corpus, arguments.dtypes, arguments.quants)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
