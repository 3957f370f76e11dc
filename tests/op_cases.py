"""The ops' test cases: op_shapes.txt read, random data of a case, and what the ops should give in f64.

Data is heavy-tailed (Student's t), as activations and weights of language models are.
"""

import ctypes
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import custom_ops
from custom_ops import QuantizedArray, _library

DTYPES: dict[str, Any] = {"fp32": jnp.float32, "f32": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """A line of op_shapes.txt."""

    rows: int = 1
    outputs: int = 0
    k: int = 0
    dtype: str = "bf16"
    weight: str = "same"
    y: str = "f32"
    ln: int = 0
    bias: int = 0
    residual: int = 0
    k_multiplier: int = 0
    gelu_from: int | None = None
    act_dim: int | None = None
    int8_activations: int = 0

    @property
    def num_gelu(self) -> int:
        return 0 if self.gelu_from is None else self.outputs - self.gelu_from


@dataclasses.dataclass(frozen=True)
class DecodeAttentionCase:
    """A line of op_shapes.txt."""

    batch: int
    heads: int
    head_dim: int
    page_len: int
    max_pages: int
    lengths: tuple[int, ...]
    num_new: tuple[int, ...]
    rotary_dim: int = 0
    dtype: str = "bf16"
    act_dim: int | None = None


def read_cases(op: str) -> list[Any]:
    """The cases of an op, in the order of the file."""
    kind: Any = {"linear": LinearCase, "decode_attention": DecodeAttentionCase}[op]
    cases = []
    for line in pathlib.Path(__file__).with_name("op_shapes.txt").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words or words[0].startswith("#") or words[0] != op:
            continue
        options = dict(word.split("=") for word in words[1:])
        cases.append(kind(**{name: _value(name, text) for name, text in options.items()}))
    assert cases, f"op_shapes.txt has no case of {op}"
    return cases


def _value(name: str, text: str) -> Any:
    if name in ("dtype", "weight", "y"):
        return text
    if name in ("lengths", "num_new"):
        return tuple(int(part) for part in text.split(","))
    return int(text)


def case_id(case: Any) -> str:
    """A readable test id: the values that are not defaults."""
    default = {field.name: field.default for field in dataclasses.fields(case)}
    values = dataclasses.asdict(case).items()
    return "-".join(f"{name}{_joined(value)}" for name, value in values if value != default[name])


def _joined(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def heavy_tailed(rng: np.random.Generator, *shape: int, dtype: Any, scale: float = 1.0) -> jax.Array:
    """Student's t with 4 degrees of freedom: now and then ten times its usual size."""
    return jnp.asarray(scale * rng.standard_t(4, size=shape), dtype)


def linear_arguments(case: LinearCase, seed: int = 0) -> dict[str, Any]:
    """Arguments of `custom_ops.linear`, implementation and semaphores apart; arrays only where the case has them."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    weight: Any = heavy_tailed(rng, case.outputs, case.k, dtype=dtype, scale=case.k**-0.5)
    if case.weight == "int8":
        weight = custom_ops.quantize_weight(weight)
    # LayerNorm has a mean to take away.
    x = heavy_tailed(rng, case.rows, case.k, dtype=jnp.float32) + 0.5 * case.ln
    arguments = {"x": x.astype(jnp.float32 if case.ln else dtype), "weight": weight}
    if case.ln:
        arguments["ln_scale"] = 1 + heavy_tailed(rng, case.k, dtype=dtype, scale=0.1)
        arguments["ln_bias"] = heavy_tailed(rng, case.k, dtype=dtype, scale=0.1)
    if case.bias:
        arguments["bias"] = heavy_tailed(rng, case.num_gelu or case.outputs, dtype=dtype, scale=0.3)
    if case.k_multiplier:
        arguments["k_multiplier"] = jnp.exp(heavy_tailed(rng, case.k, dtype=jnp.float32, scale=0.2))
    if case.residual:
        num_y = case.outputs - case.num_gelu
        arguments["residual"] = heavy_tailed(rng, case.rows, num_y, dtype=jnp.float32)
    return arguments


def call_linear(case: LinearCase, arguments: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """`custom_ops.linear` of such arguments."""
    arguments = dict(arguments)
    if case.ln:
        arguments["layer_norm"] = (arguments.pop("ln_scale"), arguments.pop("ln_bias"), EPSILON)
    options = {
        "out_dtype": DTYPES[case.y],
        "gelu_from": case.gelu_from,
        "act_dim": case.act_dim,
        "int8_activations": bool(case.int8_activations),
    } | options
    return custom_ops.linear(arguments.pop("x"), arguments.pop("weight"), **arguments, **options)


def linear_oracle(
    case: LinearCase, arguments: dict[str, Any], *, has_integers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(y, GELU's outputs) in f64: nothing is rounded on the way, and an INT8 weight is taken as it is.

    ``has_integers``: h is rounded to integers of 16 bits, or of 8, as the kernels for sm_90a do it beside an INT8
    weight.
    """
    values = {name: _as_f64(array) for name, array in arguments.items()}
    h = values["x"]
    if case.ln:
        h = h - h.mean(axis=-1, keepdims=True)
        h = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + EPSILON) * values["ln_scale"] + values["ln_bias"]
    h = h * values.get("k_multiplier", 1.0)
    if has_integers:
        h = as_integers(h, 127 if case.int8_activations else 32639, group_len=case.k if case.ln else 256)
    z = h @ values["weight"].T
    split = case.outputs - case.num_gelu
    y, gelu = z[:, :split], z[:, split:]
    bias = values.get("bias", 0.0)
    if case.gelu_from is None:
        return y + bias + values.get("residual", 0.0), gelu
    gelu = gelu + bias
    gelu = 0.5 * gelu * (1 + np.tanh(np.sqrt(2 / np.pi) * (gelu + 0.044715 * gelu**3)))
    return y + values.get("residual", 0.0), gelu


def as_integers(h: np.ndarray, largest: int, *, group_len: int) -> np.ndarray:
    """Multiples of a scale for each so many columns of a row, of which ``largest`` is the largest magnitude."""
    groups = np.split(h, range(group_len, h.shape[1], group_len), axis=1)
    scales = [np.maximum(np.abs(group).max(axis=1, keepdims=True), 1e-30) / largest for group in groups]
    return np.concatenate([np.rint(group / scale) * scale for group, scale in zip(groups, scales, strict=True)], axis=1)


def _as_f64(array: Any) -> np.ndarray:
    if isinstance(array, QuantizedArray):
        return np.asarray(array.qvalue, np.float64) * np.asarray(array.scale, np.float64)
    return np.asarray(array, np.float64)


def rows_of(arguments: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The same call for some of the rows."""
    return {name: array[rows] if name in ("x", "residual") else array for name, array in arguments.items()}


def decode_attention_arguments(case: DecodeAttentionCase, seed: int = 0) -> dict[str, Any]:
    """Arguments of `custom_ops.decode_attention` by name. Each row's pages lie anywhere in the pool; all slots that
    hold no token are NaN, and so is the buffer for the result."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    num_pages = case.batch * case.max_pages + 1
    page_table = rng.permutation(num_pages - 1).reshape(case.batch, case.max_pages)
    holds_token = np.zeros((num_pages, case.page_len), bool)
    for row, length in enumerate(case.lengths):
        for token in range(length):
            holds_token[page_table[row, token // case.page_len], token % case.page_len] = True
    pages = {}
    for name in ("k_pages", "v_pages"):
        values = heavy_tailed(rng, num_pages, case.heads, case.page_len, case.head_dim, dtype=dtype)
        pages[name] = jnp.where(holds_token[:, None, :, None], values, jnp.nan).astype(dtype)
    angles = rng.uniform(0, 2 * np.pi, size=(case.batch, case.rotary_dim // 2))
    width = case.heads * case.head_dim
    return {
        "qkv": heavy_tailed(rng, case.batch, 3 * width, dtype=dtype),
        "rotary": (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)),
        **pages,
        "page_table": jnp.asarray(page_table, jnp.int32),
        "lengths": jnp.asarray(case.lengths, jnp.int32),
        "num_new": jnp.asarray(case.num_new, jnp.int32),
        "act": jnp.full((case.batch, case.act_dim or width), jnp.nan, dtype),
    }


def decode_attention_oracle(
    case: DecodeAttentionCase, arguments: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(attention's output, k_pages, v_pages) in f64, the pages with the new tokens in."""
    q, k, v = rotated_qkv(case, arguments)
    k_pages, v_pages = _as_f64(arguments["k_pages"]).copy(), _as_f64(arguments["v_pages"]).copy()
    for row, page_ids in enumerate(np.asarray(arguments["page_table"])):
        length = case.lengths[row]
        if case.num_new[row]:
            page, slot = page_ids[length // case.page_len], length % case.page_len
            k_pages[page, :, slot], v_pages[page, :, slot] = k[row], v[row]
    out = np.zeros((case.batch, case.heads, case.head_dim))
    for row in map(int, np.flatnonzero(case.num_new)):
        keys, values = (keys_of(case, arguments, pages, row) for pages in (k_pages, v_pages))
        out[row] = np.einsum("ns,nsh->nh", softmax_of(q[row], keys), values)
    return out.reshape(case.batch, -1), k_pages, v_pages


def rotated_qkv(case: DecodeAttentionCase, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v in f64, each [batch, heads, head_dim], not rounded."""
    qkv = _as_f64(arguments["qkv"]).reshape(case.batch, 3, case.heads, case.head_dim)
    cos, sin = (_as_f64(table)[:, None] for table in arguments["rotary"])
    q, k, v = (qkv[:, part].copy() for part in range(3))
    for head in (q, k):
        even, odd = head[..., 0 : case.rotary_dim : 2].copy(), head[..., 1 : case.rotary_dim : 2].copy()
        head[..., 0 : case.rotary_dim : 2] = even * cos - odd * sin
        head[..., 1 : case.rotary_dim : 2] = odd * cos + even * sin
    return q, k, v


def keys_of(case: DecodeAttentionCase, arguments: dict[str, Any], pages: np.ndarray, row: int) -> np.ndarray:
    """What a row's new token attends to, of these pages: [heads, tokens, head_dim]."""
    page_ids = np.asarray(arguments["page_table"])[row]
    return np.concatenate(list(pages[page_ids]), axis=1)[:, : case.lengths[row] + 1]


def softmax_of(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Attention's weights of one query: [heads, tokens]."""
    scores = np.einsum("nh,nsh->ns", q, keys) / np.sqrt(q.shape[-1])
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)


def instruction_sets() -> list[str]:
    """What the Host handlers can run with on this machine, worst first; on a GPU, where they do not run, its name."""
    if jax.default_backend() != "cpu":
        return [jax.default_backend()]
    names = []
    for limit in range(3):
        names.append(limit_instruction_set(limit))
    limit_instruction_set(names.index(names[-1]))
    return list(dict.fromkeys(names))


def limit_instruction_set(limit: int | str) -> str:
    """Lets the Host handlers use at most this instruction set; returns which they use now."""
    names = ("portable", "avx2", "avx512")
    path = _library.load("cpu").path
    if jax.default_backend() != "cpu" or path is None:
        return str(limit)
    library = ctypes.CDLL(path)
    library.KogptOpsHostIsa.restype = ctypes.c_char_p
    library.KogptOpsLimitHostIsa(names.index(limit) if isinstance(limit, str) else limit)
    return library.KogptOpsHostIsa().decode()
