"""The test cases of `prefill_attention`: prefill_attention_shapes.txt read, random data of a case, and what the op
should give in f64."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from op_cases import DTYPES, heavy_tailed


@dataclasses.dataclass(frozen=True)
class PrefillAttentionCase:
    """A line of prefill_attention_shapes.txt."""

    total_tokens: int
    heads: int
    head_dim: int
    page_len: int
    max_pages: int
    begins: tuple[int, ...]
    num_new: tuple[int, ...]
    lengths: tuple[int, ...]
    rotary_dim: int = 0
    dtype: str = "bf16"
    act_dim: int | None = None
    max_new: int | None = None

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def read_cases() -> list[PrefillAttentionCase]:
    """The cases, in the order of the file."""
    cases = []
    path = pathlib.Path(__file__).with_name("prefill_attention_shapes.txt")
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            options = dict(word.split("=") for word in line.split())
            cases.append(PrefillAttentionCase(**{name: _value(name, text) for name, text in options.items()}))
    return cases


def _value(name: str, text: str) -> Any:
    if name == "dtype":
        return text
    if name in ("begins", "num_new", "lengths"):
        return tuple(int(part) for part in text.split(","))
    return int(text)


def case_id(case: PrefillAttentionCase) -> str:
    """Short enough to read: rows by their number."""
    return f"{case.dtype}-tokens{case.total_tokens}-rows{len(case.begins)}-{case.heads}x{case.head_dim}"


def arguments_of(case: PrefillAttentionCase, seed: int = 0) -> dict[str, Any]:
    """Arguments of `custom_ops.prefill_attention` by name. Each row's pages lie anywhere in the pool; all slots that
    hold no token, all tokens of no row and the buffer for the result are NaN, and page ids that no token needs name no
    page."""
    rng = np.random.default_rng(seed)
    dtype, batch = DTYPES[case.dtype], len(case.begins)
    num_pages = batch * case.max_pages + 1
    page_table = rng.permutation(num_pages - 1).reshape(batch, case.max_pages)
    holds_token = np.zeros((num_pages, case.page_len), bool)
    is_of_row = np.zeros(case.total_tokens, bool)
    for row, (begin, num_new, length) in enumerate(zip(case.begins, case.num_new, case.lengths, strict=True)):
        for token in range(length):
            holds_token[page_table[row, token // case.page_len], token % case.page_len] = True
        is_of_row[begin : begin + num_new] = True
        page_table[row, -(-(length + num_new) // case.page_len) :] = 2**30
    pages = {}
    for name in ("k_pages", "v_pages"):
        values = heavy_tailed(rng, num_pages, case.heads, case.page_len, case.head_dim, dtype=dtype)
        pages[name] = jnp.where(holds_token[:, None, :, None], values, jnp.nan).astype(dtype)
    angles = rng.uniform(0, 2 * np.pi, size=(case.total_tokens, case.rotary_dim // 2))
    angles[~is_of_row] = np.nan
    qkv = heavy_tailed(rng, case.total_tokens, 3 * case.width, dtype=dtype)
    return {
        "qkv": jnp.where(is_of_row[:, None], qkv, jnp.nan).astype(dtype),
        "rotary": (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)),
        **pages,
        "page_table": jnp.asarray(page_table, jnp.int32),
        "begins": jnp.asarray(case.begins, jnp.int32),
        "num_new": jnp.asarray(case.num_new, jnp.int32),
        "lengths": jnp.asarray(case.lengths, jnp.int32),
        "act": jnp.full((case.total_tokens, case.act_dim or case.width), jnp.nan, dtype),
    }


def rotated_qkv(case: PrefillAttentionCase, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v in f64, each [total_tokens, heads, head_dim], before they are rounded to dtype."""
    qkv = np.asarray(arguments["qkv"], np.float64).reshape(-1, 3, case.heads, case.head_dim)
    cos, sin = (np.asarray(table, np.float64)[:, None] for table in arguments["rotary"])
    q, k, v = (qkv[:, part].copy() for part in range(3))
    for head in (q, k):
        even, odd = head[..., 0 : case.rotary_dim : 2].copy(), head[..., 1 : case.rotary_dim : 2].copy()
        head[..., 0 : case.rotary_dim : 2] = even * cos - odd * sin
        head[..., 1 : case.rotary_dim : 2] = odd * cos + even * sin
    return q, k, v


def new_slots(case: PrefillAttentionCase, arguments: dict[str, Any], row: int) -> tuple[Any, ...]:
    """Index of the slots of a row's new tokens in the pages: [num_new, heads, ...]."""
    positions = np.arange(case.lengths[row], case.lengths[row] + case.num_new[row])
    pages = np.asarray(arguments["page_table"])[row, positions // case.page_len]
    return pages, slice(None), positions % case.page_len


def attention_of(
    case: PrefillAttentionCase, arguments: dict[str, Any], k_pages: np.ndarray, v_pages: np.ndarray
) -> np.ndarray:
    """act in f64 over pages that hold the new tokens already. Rotated q is rounded, as the contract has it: of one
    query among many some score is large, and a rounding of it moves all weights."""
    q = _rounded(case, rotated_qkv(case, arguments)[0])
    act = np.asarray(arguments["act"], np.float64).copy()
    for row, (begin, num_new, length) in enumerate(zip(case.begins, case.num_new, case.lengths, strict=True)):
        if num_new == 0:
            continue
        new = slice(begin, begin + num_new)
        page_ids = np.asarray(arguments["page_table"])[row, : -(-(length + num_new) // case.page_len)]
        keys, values = (
            np.concatenate(list(pages[page_ids]), axis=1)[:, : length + num_new] for pages in (k_pages, v_pages)
        )
        scores = np.einsum("tnh,nsh->nts", q[new], keys, optimize=True) / np.sqrt(case.head_dim)
        positions = np.arange(length, length + num_new)
        scores = np.where(np.arange(length + num_new) <= positions[:, None], scores, -np.inf)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        out = np.einsum("nts,nsh->tnh", probs, values, optimize=True)
        act[new, : case.width] = out.reshape(num_new, case.width)
    return act


def oracle_of(case: PrefillAttentionCase, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(act, k_pages, v_pages) in f64, NaN where they were."""
    _, k, v = rotated_qkv(case, arguments)
    k_pages, v_pages = (np.asarray(arguments[name], np.float64).copy() for name in ("k_pages", "v_pages"))
    for row, (begin, num_new) in enumerate(zip(case.begins, case.num_new, strict=True)):
        slots = new_slots(case, arguments, row)
        k_pages[slots], v_pages[slots] = _rounded(case, k)[begin : begin + num_new], v[begin : begin + num_new]
    return attention_of(case, arguments, k_pages, v_pages), k_pages, v_pages


def _rounded(case: PrefillAttentionCase, values: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(values.astype(np.float32), DTYPES[case.dtype]), np.float64)
