"""At the layer shape of KoGPT-6B: does any mode lose more than what rounding to INT8 costs by itself?

A model of a layer or two of that shape with heavy-tailed random weights: normal ones, each times e^(0.7 z), so that few
are large among many small, as in trained models. The logits of a mode are compared with those of the same weights in
f32; so are the logits of a forward written out here in f32 whose weights and activations are rounded in the open
("fake-quantised"). A mode may lose 1.1 times what that one loses and, in 16 bits, what the unquantised model in the
same dtype loses besides (errors add as squares). A layer in f32 takes some 5 GB of memory:

    python benchmarks/layer_accuracy.py --json benchmarks/results/layer_accuracy_cpu.json
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment, write_result
from jaxtyping import Array

from custom_ops import numerics, quantize_weight
from custom_ops.quantization import dequantize
from custom_ops.rotary import apply_rotary
from kogpt_jax import KOGPT_6B, KoGPT, decoding, kv_cache, smoothing
from kogpt_jax.config import Dtype, ModelConfig, Quant
from kogpt_jax.evaluation import add_outliers
from kogpt_jax.model import model_def, random_leaves, rotary_tables
from kogpt_jax.sharding import make_mesh

ALLOWED = 1.1
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")
SETTINGS = smoothing.Settings(strengths=(0.4, 0.6, 0.8), num_tokens=256, window=64, num_rows=64)

Leaves = dict[str, Array]


def heavy_tailed(config: ModelConfig) -> Leaves:
    """Leaves by path; matrices but the embedding have a heavy tail."""
    leaves = {}
    params = model_def(config).params
    for index, (param, leaf) in enumerate(zip(params, random_leaves(config, make_mesh()), strict=True)):
        if param.path.rpartition(".")[2] in ("w_in", "w_out", "lm_head"):
            leaf = _with_tail(leaf, jax.random.key(1000 + index))
        leaves[param.path] = leaf
    return leaves


@jax.jit
def _with_tail(leaf: Array, key: Array) -> Array:
    return leaf * jnp.exp(0.7 * jax.random.normal(key, leaf.shape, jnp.float32))


def rounded(x: Array) -> Array:
    """To INT8 and back, a scale for each row of the last axis."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.round(x / scale) * scale


def fake_quantised(
    config: ModelConfig, leaves: Mapping[str, Array], tokens: np.ndarray, quant: str, kv_dtype: str | None = None
) -> np.ndarray:
    """Logits in f32. ``quant`` says what is rounded: "none", "w8a16" weights, "w8a8" the layers' activations too;
    ``kv_dtype`` "int8": keys and values."""

    @jax.jit
    def product(x: Array, weight: Array) -> Array:
        w = weight.reshape(weight.shape[-2:])
        w = dequantize(quantize_weight(w)) if quant != "none" else w
        return numerics.product(rounded(x) if quant == "w8a8" else x, w, jnp.float32)

    def norm(x: Array, name: str) -> Array:
        scale, bias = (leaves[name + part].reshape(-1) for part in ("scale", "bias"))
        return numerics.layer_norm(x, scale, bias, config.layer_norm_epsilon)

    q_len = len(tokens)
    cos, sin = (table[None, :, None] for table in rotary_tables(jnp.arange(q_len), config))
    x = leaves["embedding"][tokens]
    for layer in range(config.num_layers):
        block = f"blocks.{layer}."
        z = product(norm(x, block + "ln_"), leaves[block + "w_in"])
        q, k, v, ffn = jnp.split(z, np.arange(1, 4) * config.model_dim, axis=1)
        q, k, v = (part.reshape(q_len, config.num_heads, config.head_dim) for part in (q, k, v))
        q, k = (part[0] for part in apply_rotary(q[None], k[None], (cos, sin)))
        if kv_dtype == "int8":
            k, v = rounded(k), rounded(v)
        scores = numerics.einsum("tnh,snh->nts", q, k) / math.sqrt(config.head_dim)
        scores = jnp.where(jnp.tri(q_len, dtype=bool), scores, -jnp.inf)
        attn = numerics.einsum("nts,snh->tnh", jax.nn.softmax(scores, axis=-1), v).reshape(q_len, -1)
        gelu = jax.nn.gelu(ffn + leaves[block + "b_ffn_in"].reshape(-1), approximate=True)
        act = jnp.concatenate([attn, gelu], axis=1) * leaves.get(block + "w_out_multiplier", jnp.ones(1)).reshape(-1)
        x = x + product(act, leaves[block + "w_out"]) + leaves[block + "b_ffn_out"].reshape(-1)
    logits = numerics.product(
        norm(x, "ln_f_"),
        dequantize(quantize_weight(leaves["lm_head"])) if quant != "none" else leaves["lm_head"],
        jnp.float32,
    )
    return np.asarray(logits + leaves["lm_head_bias"])


def logits_of(config: ModelConfig, leaves: Leaves, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Of a mode, whole and step by step, through the engine."""
    engine = KoGPT(config, smoothing.quantized_leaves(config, dict(leaves), make_mesh()), make_mesh())
    cache = kv_cache.make_kv_cache(engine.config, engine.mesh, 1, len(tokens))
    static: dict[str, Any] = {"definition": engine._definition, "mesh": engine.mesh}
    steps = decoding.stepped_logits(engine.leaves, cache, tokens[None], **static)
    return {"prefill": engine.logits(tokens.tolist()), "decode": np.asarray(steps)[0]}


def error(logits: np.ndarray, exact: np.ndarray) -> float:
    """RMS of the difference, relative to the RMS of the exact logits."""
    return float(np.sqrt(np.mean(np.square(logits - exact)) / np.mean(np.square(exact))))


def run(num_layers: int, num_tokens: int, vocab_size: int, outliers: float | None) -> dict[str, Any]:
    config = dataclasses.replace(KOGPT_6B, num_layers=num_layers, vocab_size=vocab_size, dtype="fp32")
    leaves = heavy_tailed(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, num_tokens).astype(np.int32)
    exact = fake_quantised(config, leaves, tokens, "none")
    if outliers is not None:
        add_outliers(config, leaves, outliers)
        config = dataclasses.replace(config, has_multiplier=True)
    modes: dict[str, Any] = {}
    of_dtype: dict[tuple[str, str], float] = {}
    for weights in ("plain", "smoothed"):
        if weights == "smoothed":
            windows = [rng.integers(0, vocab_size, 64).tolist() for _ in range(4)]
            smoothing.smooth(config, leaves, make_mesh(), windows, SETTINGS)
            config = dataclasses.replace(config, has_multiplier=True)
        quants: tuple[Quant, ...] = ("none", "w8a16", "w8a8") if weights == "plain" else ("w8a8",)
        for quant, kv_dtype in itertools.product(quants, (None, "int8")):
            # Decode steps of w8a8 leave the activations as they are, but for the kernels for sm_90a.
            fake_of = {"prefill": quant, "decode": "w8a16" if quant == "w8a8" else quant}
            fakes = {
                kind: error(fake_quantised(config, leaves, tokens, kind, kv_dtype), exact)
                for kind in set(fake_of.values())
            }
            for dtype in DTYPES:
                found = logits_of(
                    dataclasses.replace(config, dtype=dtype, quant=quant, kv_dtype=kv_dtype), leaves, tokens
                )
                for phase, logits in found.items():
                    result = {"logit_error": error(logits, exact)}
                    if quant == "none" and kv_dtype is None:
                        of_dtype[dtype, phase] = result["logit_error"]
                        assert dtype != "fp32" or result["logit_error"] < 1e-5  # the same function
                    else:
                        result["fake_quantised"] = fakes[fake_of[phase]]
                        allowed = math.hypot(result["fake_quantised"], of_dtype[dtype, phase])
                        result["ratio"] = result["logit_error"] / allowed
                    name: str = quant if quant != "none" else "unquantised"
                    name += "-smoothed" * (weights == "smoothed") + "-kv8" * (kv_dtype is not None)
                    modes[f"{name} {dtype} {phase}"] = result
                    print(f"{name:<20}{dtype:<6}{phase:<9}", *(f"{key} {value:.3e}" for key, value in result.items()))
    return {
        "num_layers": num_layers,
        "num_tokens": num_tokens,
        "vocab_size": vocab_size,
        "outliers": outliers,
        "modes": modes,
        "largest_ratio": max(result.get("ratio", 0.0) for result in modes.values()),
        "allowed_ratio": ALLOWED,
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--outliers", type=float, help="factor of added outliers, as in kogpt eval perplexity")
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    arguments = parser.parse_args()
    result = run(arguments.layers, arguments.tokens, arguments.vocab, arguments.outliers)
    write_result(arguments.json, result)
    if not result["largest_ratio"] <= ALLOWED:
        raise SystemExit(f"a mode loses {result['largest_ratio']:.3f} times what it may, {ALLOWED} are allowed")


if __name__ == "__main__":
    main()
