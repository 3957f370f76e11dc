"""Frozen dataclasses: what a model is, read from and written to Hugging Face's ``config.json``; what computes it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from kogpt_jax.errors import InputError
from kogpt_jax.json_files import read_json_object

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
Quant = Literal["none", "w8a16", "w8a8"]
QUANTS: tuple[str, ...] = get_args(Quant)
Implementation = Literal["reference", "ffi"]
GemmImplementation = Literal["reference", "ffi", "linear"]
AllReduce = Literal["psum", "in_order", "ffi"]
DeviceGrid = tuple[tuple[tuple[int, ...], ...], ...]  # [data][pipe][tensor]

# One formula under its Hugging Face names: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
_TANH_GELU_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")

NUMPY_DTYPES: dict[str, np.dtype] = {
    "fp32": np.dtype(jnp.float32),
    "fp16": np.dtype(jnp.float16),
    "bf16": np.dtype(jnp.bfloat16),
}
_TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT-J-architecture model: sizes, constants, the dtype of weights and activations, the weights' quantisation.

    Frozen, because it is a static argument of jitted functions. Letters are the project's shape letters.

    Raises:
        InputError: a size is not positive or sizes do not fit each other.
    """

    vocab_size: int  # V
    max_len: int  # tokens a sequence may have that are read, the context; one more may be sampled behind them
    model_dim: int  # D
    num_layers: int  # L
    num_heads: int  # N
    rotary_dim: int  # leading part of each head that is rotated, even
    ffn_dim: int  # F
    layer_norm_epsilon: float = 1e-5
    eos_token_ids: tuple[int, ...] = ()  # a row ends when one of these is sampled
    dtype: Dtype = "bf16"
    # w8a16: matrices of the layers and lm_head in INT8 with an f32 scale an output; all else and activations in dtype.
    # w8a8: the same weights; where whole sequences go through a layer, its products' activations are rounded to INT8
    # too, with a scale a token. So are those of decode steps by the kernels for sm_90a, with a scale a row behind
    # LayerNorm and one for 256 columns of a row in front of w_out; elsewhere they are as in w8a16, and so is lm_head.
    quant: Quant = "none"
    # int8: cached keys and values in INT8 with an f32 scale a token and head. None, or dtype's name: in dtype.
    kv_dtype: str | None = None
    # The inputs of each layer's ``w_out`` are multiplied channel by channel by an f32 parameter: what SmoothQuant takes
    # out of them where no other parameter can.
    has_multiplier: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_len", "model_dim", "num_layers", "num_heads", "rotary_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.model_dim % self.num_heads:
            raise InputError(f"model_dim {self.model_dim} is not a multiple of num_heads {self.num_heads}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise InputError(f"rotary_dim must be even and at most head_dim {self.head_dim}, got {self.rotary_dim}")
        if not self.layer_norm_epsilon > 0:
            raise InputError(f"layer_norm_epsilon must be positive, got {self.layer_norm_epsilon}")
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InputError(f"eos_token_ids holds {token_id}, outside the vocabulary of {self.vocab_size}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.quant not in QUANTS:
            raise InputError(f"quant must be one of {', '.join(QUANTS)}, got {self.quant!r}")
        if self.kv_dtype not in (None, self.dtype, "int8"):
            raise InputError(f"kv_dtype must be {self.dtype} (the model's dtype) or int8, got {self.kv_dtype!r}")
        if self.kv_dtype == self.dtype:
            object.__setattr__(self, "kv_dtype", None)  # one name each, so that jit's cache holds

    @property
    def head_dim(self) -> int:
        """Per-head width H."""
        return self.model_dim // self.num_heads

    @property
    def jax_dtype(self) -> np.dtype:
        """``dtype`` as JAX and NumPy know it."""
        return NUMPY_DTYPES[self.dtype]

    @property
    def cache_dtype(self) -> np.dtype:
        """Dtype of cached keys and values."""
        return self.jax_dtype if self.kv_dtype is None else np.dtype(np.int8)

    @classmethod
    def from_hf_dict(cls, hf: Mapping[str, Any], *, dtype: Dtype = "bf16", source: str = "config") -> "ModelConfig":
        """Reads Hugging Face's GPT-J configuration; absent keys take ``GPTJConfig``'s defaults.

        Args:
            hf: the parsed ``config.json``.
            dtype: dtype to run in; the file's own ``torch_dtype`` is not trusted, the stored tensors say it.
            source: what an error names, usually the file's path.

        Raises:
            InputError: another architecture, a key without support, or a value of the wrong kind.
        """
        if hf.get("model_type") != "gptj":
            raise InputError(f"{source}: model_type must be 'gptj', got {hf.get('model_type')!r}")
        activation = hf.get("activation_function", "gelu_new")
        if activation not in _TANH_GELU_NAMES:
            raise InputError(f"{source}: activation_function {activation!r} is not supported, only 'gelu_new'")
        if hf.get("tie_word_embeddings", False):
            raise InputError(f"{source}: tie_word_embeddings true is not supported")
        if hf.get("quantization_config") is not None:
            raise InputError(f"{source}: quantization_config is not supported, expected unquantised weights")
        fields: dict[str, Any] = {
            "vocab_size": _integer(hf, "vocab_size", 50400, source),
            "max_len": _integer(hf, "n_positions", 2048, source),
            "model_dim": _integer(hf, "n_embd", 4096, source),
            "num_layers": _integer(hf, "n_layer", 28, source),
            "num_heads": _integer(hf, "n_head", 16, source),
            "rotary_dim": _integer(hf, "rotary_dim", 64, source),
            "ffn_dim": _integer(hf, "n_inner", 4 * _integer(hf, "n_embd", 4096, source), source),
            "layer_norm_epsilon": _number(hf, "layer_norm_epsilon", 1e-5, source),
            "eos_token_ids": _eos_token_ids(hf, source),
        }
        try:
            return cls(**fields, dtype=dtype)
        except InputError as error:  # sizes that do not fit each other
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def from_hf_dir(cls, directory: str | pathlib.Path, *, dtype: Dtype = "bf16") -> "ModelConfig":
        """Reads ``config.json`` of a Hugging Face model directory.

        Where there is a ``generation_config.json`` that names end-of-text ids, these count, as in Hugging Face's
        ``generate``.

        Raises:
            InputError: the directory or file is missing, is no JSON object, or says what ``from_hf_dict`` refuses.
        """
        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise InputError(f"model directory does not exist: {directory}")
        path = directory / "config.json"
        if not path.is_file():
            raise InputError(f"config.json is missing in {directory}")
        config = cls.from_hf_dict(read_json_object(path), dtype=dtype, source=str(path))
        generation = directory / "generation_config.json"
        if generation.is_file():
            named = read_json_object(generation)
            if named.get("eos_token_id") is not None:
                ids = _eos_token_ids({**named, "vocab_size": config.vocab_size}, str(generation))
                config = dataclasses.replace(config, eos_token_ids=ids)
        return config

    def to_hf_dict(self) -> dict[str, Any]:
        """The ``config.json`` that Hugging Face transformers reads back as this model, unquantised."""
        eos = self.eos_token_ids
        return {
            "architectures": ["GPTJForCausalLM"],
            "model_type": "gptj",
            "vocab_size": self.vocab_size,
            "n_positions": self.max_len,
            "n_embd": self.model_dim,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "rotary_dim": self.rotary_dim,
            "n_inner": self.ffn_dim,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "bos_token_id": None,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": False,
            "torch_dtype": _TORCH_DTYPES[self.dtype],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """What runs each op: ``"ffi"``, the project's own kernel, or ``"reference"``, XLA.

    `ops.resolve_ops` makes one when an engine is built; nothing falls back afterwards.
    """

    linear: Implementation = "reference"  # products of 1 to 64 rows
    linear_many_rows: Implementation = "reference"  # products of more rows; "ffi" takes them in groups of 64
    # Up to so many tokens of prompts read at once, the layers' products are `linear`'s, as a decode step's are.
    linear_prefill_tokens: int = 0
    decode_attention: Implementation = "reference"
    # All layers of a decode step as one call, up to 64 rows; "reference": op by op.
    decode_layers: Implementation = "reference"
    # Several steps of greedy rows as one call, where a step's layers are one; "reference": step by step.
    decode_steps: Implementation = "reference"
    prefill_attention: Implementation = "reference"
    # Layers' products of more tokens with INT8 weights; the others are XLA's. "linear" (w8a16): groups of 64 rows.
    gemm: GemmImplementation = "reference"
    # A decode step's sums over shards: the project's kernel, or what adds up more values than it takes. "in_order" adds
    # shards in their order, as the kernel does: a library's sum may take them in an order that depends on the place in
    # the array, and so on the row.
    all_reduce: AllReduce = "psum"
    all_reduce_many_values: Literal["psum", "in_order"] = "psum"
    devices: DeviceGrid = ()  # for "ffi": CUDA's numbers of the mesh's devices


def _integer(hf: Mapping[str, Any], key: str, default: int, source: str) -> int:
    """An integer key; only ``n_inner`` may be null (then the default), as in ``GPTJConfig``."""
    value = hf.get(key, default)
    if value is None and key == "n_inner":
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{source}: {key} must be an integer, got {value!r}")
    if value < 1:
        raise InputError(f"{source}: {key} must be at least 1, got {value}")
    return value


def _number(hf: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = hf.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{source}: {key} must be a number, got {value!r}")
    return float(value)


def _eos_token_ids(hf: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """``eos_token_id``: an id, a list of ids, null or absent."""
    value = hf.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise InputError(f"{source}: eos_token_id must hold integers, got {value!r}")
    # GPTJConfig's default 50256 stands in files whose vocabulary is smaller: such an id can never be sampled.
    vocab_size = _integer(hf, "vocab_size", 50400, source)
    return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)


# Kakao Brain's KoGPT (KoGPT6B-ryan1.5b): its model card's table, and GPT-J's defaults for the rest. The card does not
# give the id of [EOS]; the tokenizer of a loaded checkpoint does.
KOGPT_6B = ModelConfig(
    vocab_size=64512,
    max_len=2048,
    model_dim=4096,
    num_layers=28,
    num_heads=16,
    rotary_dim=64,
    ffn_dim=16384,
    dtype="bf16",
)

# The model that is shipped under kogpt_jax/demo.
DEMO = ModelConfig(
    vocab_size=8000,
    max_len=512,
    model_dim=256,
    num_layers=8,
    num_heads=4,
    rotary_dim=32,
    ffn_dim=1024,
    eos_token_ids=(1,),
    dtype="fp16",
)
