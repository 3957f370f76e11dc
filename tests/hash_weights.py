"""Model weights and prompts from a hash formula, so that goldens store outputs only.

A value depends on its Hugging Face key, its flat index and a salt alone. Integer arithmetic, exact conversions and one
f32 product make it, which IEEE 754 fixes to the bit: the same on every platform and numpy version. The digests in
goldens/manifest.json check that.

The scales keep a random model lively: attention scores with a standard deviation of about 2 (far from uniform), logits
of about 2, values that outweigh the FFN (so that the text depends on more than its last token), and an embedding small
enough that the first LayerNorm feels its epsilon.
"""

import hashlib
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

STORAGE_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# (suffix of the key, mean, standard deviation, whether that is divided by sqrt(fan-in)).
_SCALES = (
    ("wte.weight", 0.0, 0.1, False),
    ("ln_1.weight", 1.0, 0.1, False),
    ("ln_1.bias", 0.0, 0.1, False),
    ("ln_f.weight", 1.0, 0.1, False),
    ("ln_f.bias", 0.0, 0.1, False),
    ("attn.q_proj.weight", 0.0, 1.4, True),
    ("attn.k_proj.weight", 0.0, 1.4, True),
    ("attn.v_proj.weight", 0.0, 2.0, True),
    ("attn.out_proj.weight", 0.0, 1.0, True),
    ("mlp.fc_in.weight", 0.0, 1.0, True),
    ("mlp.fc_in.bias", 0.0, 0.1, False),
    ("mlp.fc_out.weight", 0.0, 1.0, True),
    ("mlp.fc_out.bias", 0.0, 0.1, False),
    ("lm_head.weight", 0.0, 2.0, True),
    ("lm_head.bias", 0.0, 0.1, False),
)


def hash_uint64(name: str, count: int) -> np.ndarray:
    """``count`` 64-bit hashes of (name, index): splitmix64's finaliser over a counter that the name's CRC offsets."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # array products wrap, as they must
    x += np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_normal(name: str, shape: tuple[int, ...], mean: float, std: float) -> np.ndarray:
    """f32 values, nearly normal: the four 16-bit parts of a hash, summed, have variance (2^32 - 1) / 3."""
    h = hash_uint64(name, math.prod(shape))
    total = np.zeros(h.shape, np.int32)
    for shift in (0, 16, 32, 48):
        total += ((h >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int32)
    # Exact up to here: 19-bit integers around zero. sqrt, division and the f32 operations are correctly rounded.
    centred = (total - 2 * 65535).astype(np.float32)
    return (centred * np.float32(std * math.sqrt(3.0) / 65536) + np.float32(mean)).reshape(shape)


def hash_prompt(name: str, length: int, vocab_size: int) -> list[int]:
    """Token ids over the whole vocabulary."""
    return [int(value) for value in hash_uint64(f"prompt/{name}/{length}", length) % np.uint64(vocab_size)]


def tensor_shapes(hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face GPT-J checkpoint, in file order, from its ``config.json``."""
    d, v = hf["n_embd"], hf["vocab_size"]
    f = 4 * d if hf["n_inner"] is None else hf["n_inner"]
    block = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.q_proj.weight": (d, d),
        "attn.k_proj.weight": (d, d),
        "attn.v_proj.weight": (d, d),
        "attn.out_proj.weight": (d, d),
        "mlp.fc_in.weight": (f, d),
        "mlp.fc_in.bias": (f,),
        "mlp.fc_out.weight": (d, f),
        "mlp.fc_out.bias": (d,),
    }
    shapes = {"transformer.wte.weight": (v, d)}
    for layer in range(hf["n_layer"]):
        shapes |= {f"transformer.h.{layer}.{key}": shape for key, shape in block.items()}
    return shapes | {
        "transformer.ln_f.weight": (d,),
        "transformer.ln_f.bias": (d,),
        "lm_head.weight": (v, d),
        "lm_head.bias": (v,),
    }


def hash_state_dict(hf: Mapping[str, Any], *, salt: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face key, f32 tensor) of the model that a ``config.json`` describes."""
    for key, shape in tensor_shapes(hf).items():
        mean, std, by_fan_in = next(scale[1:] for scale in _SCALES if key.endswith(scale[0]))
        yield key, hash_normal(f"{salt}/{key}", shape, mean, std / math.sqrt(shape[-1]) if by_fan_in else std)


def write_checkpoint(
    directory: str | pathlib.Path, hf: Mapping[str, Any], dtype: str = "fp32", *, salt: str = ""
) -> str:
    """Writes ``config.json`` and ``model.safetensors`` as Hugging Face does.

    Args:
        directory: is made where it does not exist.
        hf: the ``config.json``; ``ModelConfig.to_hf_dict()`` makes one.
        dtype: ``fp32``, ``fp16`` or ``bf16``, in which the tensors are stored (rounded to nearest even).
        salt: another salt, another model.

    Returns:
        SHA-256 over the stored tensors, by which a golden names its weights.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.astype(STORAGE_DTYPES[dtype]) for key, value in hash_state_dict(hf, salt=salt)}
    config = {**hf, "torch_dtype": _TORCH_DTYPES[dtype]}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    digest = hashlib.sha256()
    for key, value in tensors.items():
        digest.update(key.encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
