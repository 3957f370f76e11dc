"""SmoothQuant (Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models"): part of what makes activations hard to round to INT8 goes into the weights, channel by channel.

A product's input channel j is divided by s_j and the weights' column j multiplied by it, which leaves the product as it
is. What divides the inputs costs nothing where it can be part of what makes them: for ``w_in`` of LayerNorm's scale and
bias; for attention's half of ``w_out`` of the rows of V, since attention is linear in V. GELU is not linear: its half
is divided by ``w_out_multiplier``, which the ops apply while they round.

    s_j = max|x_j|^strength / max|w_j|^(1 - strength)

over the tokens of a calibration text and over the outputs, made a power of two: then every product of an activation and
a weight has the bits that it had, in 16 bits too, and only what is rounded to INT8 afterwards changes. The s of a
product are centred on 1 (a common factor changes nothing), and a channel without activations or weights keeps 1.

For each layer's two products the strength is searched on single tokens of the text. What it minimises is the error of
the product with weights and activations in INT8: the mean over tokens and outputs of the squared difference to the
product in f32, relative to the mean of the squared product. Strength 0 stands for no smoothing.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from custom_ops import numerics, quantize_weight
from custom_ops.quantization import dequantize
from kogpt_jax import checkpoint, decoding
from kogpt_jax.config import Dtype, ModelConfig
from kogpt_jax.decoding import LayerInputs
from kogpt_jax.errors import InputError
from kogpt_jax.model import model_def, quantized_as
from kogpt_jax.packing import pack
from kogpt_jax.progress import progress_bar
from kogpt_jax.sharding import make_mesh
from kogpt_jax.text_files import TextFile, line_documents, read_text_file
from kogpt_jax.tokenizer import Tokenizer

_BATCH = 8
_LARGEST_EXPONENT = 12  # of s: 16 bits hold what is divided by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a calibration text is used.

    Raises:
        InputError: a strength is not in (0, 1), or a number is not positive.
    """

    strengths: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # tried for each product, beside none
    num_tokens: int = 32768  # of the text that are read at most, spread over it
    window: int = 512  # tokens that are read at a time, or the model's context where that is shorter
    num_rows: int = 512  # tokens whose products are compared

    def __post_init__(self) -> None:
        for strength in self.strengths:
            if not 0 < strength < 1:
                raise InputError(f"strengths must lie between 0 and 1, got {strength}")
        for name in ("num_tokens", "window", "num_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was found for one product: the strength, the relative squared error with it and without smoothing, and the
    factors."""

    strength: float
    error: float
    error_without: float
    factors: Float32[np.ndarray, " K"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A text to calibrate on, and how."""

    text: TextFile
    tokenizer: Tokenizer
    settings: Settings = Settings()

    @property
    def record(self) -> dict[str, Any]:
        """All that a smoothed model depends on beside its weights, as JSON has it."""
        settings = dataclasses.asdict(self.settings) | {"strengths": list(self.settings.strengths)}
        return self.text.identity | settings | {"tokenizer_sha256": tokenizer_digest(self.tokenizer)}


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of all files that say how a text becomes token ids."""
    digest = hashlib.sha256()
    for path in tokenizer.files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_calibration(path: str | os.PathLike[str], tokenizer: Tokenizer | None) -> Calibration:
    """Reads a text for a model with this tokenizer, with the default settings.

    Raises:
        InputError: what `text_files.read_text_file` refuses; there is no tokenizer.
    """
    if tokenizer is None:
        raise InputError(f"calibration {os.fspath(path)} needs a tokenizer, and the model directory has none")
    return Calibration(read_text_file("calibration", pathlib.Path(path)), tokenizer)


def make_leaves(
    source: pathlib.Path, config: ModelConfig, calibration: Calibration, *, progress: bool = False
) -> tuple[list[Array], list[dict[str, Choice]]]:
    """The leaves of a smoothed, quantised model on one device, and what was chosen for each layer's products.

    Calibrated and quantised from the weights in the dtype they are stored in. On the device are these, a layer's
    smoothed copy and what is quantised already.

    Args:
        source: a Hugging Face directory.
        config: of the model to make: quantised, with ``has_multiplier``.
        calibration: the text.
        progress: show progress bars, if stderr is a terminal.

    Raises:
        InputError: what `checkpoint.load_leaves` refuses.
    """
    stored = unquantized(config, checkpoint.stored_dtype(source))
    windows = text_windows(calibration, config.max_len)
    mesh = make_mesh()
    leaves = checkpoint.load_leaves(source, stored, mesh, progress=progress)
    by_path = {param.path: leaf for param, leaf in zip(model_def(stored).params, leaves, strict=True)}
    del leaves
    chosen = smooth(stored, by_path, mesh, windows, calibration.settings, progress=progress)
    return quantized_leaves(config, by_path, mesh), chosen


def unquantized(config: ModelConfig, dtype: Dtype) -> ModelConfig:
    """What a model is calibrated as, however it will run: without INT8 anywhere."""
    return dataclasses.replace(config, dtype=dtype, quant="none", kv_dtype=None, has_multiplier=False)


def smooth(
    config: ModelConfig,
    by_path: dict[str, Array],
    mesh: Mesh,
    windows: Sequence[Sequence[int]],
    settings: Settings,
    *,
    progress: bool = False,
) -> list[dict[str, Choice]]:
    """Smooths an unquantised model on a mesh of one device.

    Args:
        config: of the model, ``quant`` "none".
        by_path: its leaves. Replaced one by one by those of a model that ``has_multiplier``, in the same dtypes.
        mesh: one device.
        windows: token ids of the calibration text, from `text_windows`.
        settings: the strengths tried, and on how many tokens.
        progress: show progress bars, if stderr is a terminal.

    Returns:
        For each layer what was chosen for "w_in" and "w_out".
    """
    inputs = _collect(
        config, [by_path[param.path] for param in model_def(config).params], mesh, windows, settings, progress
    )
    chosen = []
    with progress_bar(config.num_layers, progress) as advance:
        for layer, found in enumerate(inputs):
            block = f"blocks.{layer}."
            choices = {
                "w_in": search(found.largest_in, found.rows_in, by_path[block + "w_in"][0, 0], settings.strengths),
                "w_out": search(found.largest_out, found.rows_out, by_path[block + "w_out"][0, 0], settings.strengths),
            }
            factors = {name: choice.factors for name, choice in choices.items()}
            by_path |= rescale_layer(by_path, layer, config, **factors)
            chosen.append(choices)
            advance("searching strengths", 1)
    return chosen


def quantized_leaves(config: ModelConfig, by_path: dict[str, Array], mesh: Mesh) -> list[Array]:
    """Unquantised leaves as a model of ``config`` holds them, in the order of its parameters. Takes them out of
    ``by_path`` one by one, so that not all are there twice.

    Raises:
        InputError: a value is too large for the model's dtype.
    """
    params = model_def(config).params
    specs = {param.path: param for param in params}
    made: dict[str, Array] = {}
    for path in list(by_path):
        leaf = by_path.pop(path)
        as_held = quantized_as(specs, path, leaf, mesh)
        if len(as_held) == 1:
            as_held = {path: leaf.astype(specs[path].dtype)}
            if not jnp.isfinite(as_held[path]).all():
                raise InputError(f"{path} holds values too large for {config.dtype}")
        made |= as_held
    return [made[param.path] for param in params]


def text_windows(calibration: Calibration, max_len: int) -> list[list[int]]:
    """The token ids that are read of a text: its lines one after another, cut into windows of at most ``max_len``, of
    which as many as the settings say are taken, spread evenly over the text.

    Raises:
        InputError: the text has no token.
    """
    tokenizer, settings = calibration.tokenizer, calibration.settings
    stream: list[int] = []
    for document in line_documents(calibration.text.text, tokenizer):
        stream += document[1:] if stream and tokenizer.eos_id is not None else document
    if not stream:
        raise InputError(f"calibration {calibration.text.path} holds no token of the model's tokenizer")
    width = min(settings.window, max_len)
    windows = [stream[first : first + width] for first in range(0, len(stream), width)]
    count = min(len(windows), max(1, settings.num_tokens // width))
    return [windows[index * len(windows) // count] for index in range(count)]


def rescale_layer(
    by_path: Mapping[str, Array],
    layer: int,
    config: ModelConfig,
    *,
    w_in: Float32[np.ndarray, " D"],
    w_out: Float32[np.ndarray, " K"],
) -> dict[str, Array]:
    """The leaves of an unquantised layer that change, by path, when the inputs of its products are divided by these
    factors and the weights' columns multiplied by them. Tensor shards are not split."""
    of_v, of_ffn = np.split(w_out, [config.model_dim])
    of_rows = np.ones(3 * config.model_dim + config.ffn_dim, np.float32)
    of_rows[2 * config.model_dim : 3 * config.model_dim] = 1 / of_v
    of_multiplier = np.concatenate([np.ones_like(of_v), 1 / of_ffn])
    scaled = {
        "ln_scale": 1 / w_in,
        "ln_bias": 1 / w_in,
        "w_in": of_rows[:, None] * w_in,
        "w_out": w_out,
        "w_out_multiplier": of_multiplier,
    }
    ones = jnp.ones((1, 1, len(w_out)), jnp.float32)
    block = f"blocks.{layer}."
    return {block + name: _scaled(by_path.get(block + name, ones), factors) for name, factors in scaled.items()}


@jax.jit
def _scaled(leaf: Array, factors: Array) -> Array:
    return (leaf.astype(jnp.float32) * factors).astype(leaf.dtype)


def search(
    largest: Float[np.ndarray, " K"],
    rows: Float[np.ndarray, "S K"],
    weight: Float[Array, "M K"],
    strengths: Sequence[float],
) -> Choice:
    """The strength with the least error of one product.

    Args:
        largest: magnitude of each input channel.
        rows: inputs of some tokens.
        weight: unquantised, output-major.
        strengths: tried beside 0, which is no smoothing.
    """
    largest_weight = np.asarray(jnp.max(jnp.abs(weight), axis=0), np.float32)
    tried = [smoothing_factors(largest, largest_weight, strength) for strength in strengths]
    tried.insert(0, np.ones_like(largest_weight))
    errors = np.asarray(_errors(rows, weight, np.stack(tried)))
    best = int(np.argmin(errors))
    return Choice((0.0, *strengths)[best], float(errors[best]), float(errors[0]), tried[best])


def smoothing_factors(
    largest: Float[np.ndarray, " K"], largest_weight: Float[np.ndarray, " K"], strength: float
) -> Float32[np.ndarray, " K"]:
    """The powers of two nearest to s (see above), their exponents centred on 0; 1 for a channel of zeros."""
    is_used = (largest > 0) & (largest_weight > 0)
    exponents = np.zeros(len(largest))
    x, w = (np.log2(values[is_used].astype(np.float64)) for values in (largest, largest_weight))
    exponents[is_used] = strength * x - (1 - strength) * w
    if is_used.any():
        exponents[is_used] -= exponents[is_used].mean()
    rounded = np.clip(np.round(exponents), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return np.ldexp(np.float32(1), rounded.astype(np.int32))


@jax.jit
def _errors(
    rows: Float[Array, "S K"], weight: Float[Array, "M K"], tried: Float32[Array, "n K"]
) -> Float32[Array, " n"]:
    """The relative squared error of the product in INT8 with each of the factors."""
    rows, weight = rows.astype(jnp.float32), weight.astype(jnp.float32)
    exact = numerics.product(rows, weight, jnp.float32)

    def error(factors: Array) -> Array:
        x, w = (dequantize(quantize_weight(values)) for values in (rows / factors, weight * factors))
        return jnp.mean(jnp.square(numerics.product(x, w, jnp.float32) - exact))

    # One after another: each has a copy of the weight. Where all outputs are 0 nothing is lost.
    return jax.lax.map(error, tried) / jnp.maximum(jnp.mean(jnp.square(exact)), jnp.finfo(jnp.float32).tiny)


def _collect(
    config: ModelConfig,
    leaves: Sequence[Array],
    mesh: Mesh,
    windows: Sequence[Sequence[int]],
    settings: Settings,
    progress: bool,
) -> list[LayerInputs]:
    """Of each layer the largest magnitudes over all tokens and the rows of some, on the host. The rows, S times
    2 D + F values a layer, are the most that is kept, however long the text is."""
    groups = [list(windows[first : first + _BATCH]) for first in range(0, len(windows), _BATCH)]
    rows_per_group = -(-settings.num_rows // len(groups))
    found = []
    with progress_bar(len(groups), progress) as advance:
        for group in groups:
            num_tokens = sum(map(len, group))
            # Empty rows, so that all batches are of few shapes.
            (packed,) = pack(group + [[]] * (min(_BATCH, len(windows)) - len(group)), chunk_tokens=num_tokens)
            picked = (np.arange(rows_per_group) * num_tokens // rows_per_group).astype(np.int32)
            static = {"definition": model_def(config), "mesh": mesh}
            found.append(jax.device_get(decoding.layer_inputs(leaves, packed, picked, **static)))
            advance("calibrating", 1)
    return [
        LayerInputs(
            *(np.max([part[field] for part in parts], axis=0) for field in (0, 1)),
            *(np.concatenate([part[field] for part in parts]) for field in (2, 3)),
        )
        for parts in zip(*found, strict=True)
    ]
