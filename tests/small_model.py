"""One small model for the tests of the core: compiled once a run, lively enough that its text depends on its prompt."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import jaxtyping
import numpy as np
from hash_weights import hash_prompt, write_checkpoint
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, decoders, models

from kogpt_jax import KoGPT
from kogpt_jax.config import Dtype, ModelConfig
from kogpt_jax.sampling import SamplingParams

EOS_NAME = "[EOS]"
# 256 bytes and [EOS], then ids 257 and 258 that the tokenizer does not know, as in vocabularies padded for a device.
# The end of the context falls inside a page. Greedy texts meet the end-of-text ids 26 and 229, early or late or never.
CONFIG = ModelConfig(
    vocab_size=259,
    max_len=150,
    model_dim=48,
    num_layers=2,
    num_heads=3,
    rotary_dim=8,
    ffn_dim=80,
    eos_token_ids=(256, 26, 229),
    dtype="fp32",
)
# Its sizes fit the kernels.
KERNEL_CONFIG = dataclasses.replace(CONFIG, model_dim=128, num_heads=2, ffn_dim=208)


def load(directory: pathlib.Path, dtype: Dtype = "fp32", *, max_batch_size: int = 64) -> KoGPT:
    """An engine over hashed weights, without a tokenizer; ``directory`` is filled where it is empty."""
    if not (directory / "config.json").exists():
        write_checkpoint(directory, CONFIG.to_hf_dict(), salt="small")
    return KoGPT.from_pretrained(directory, dtype=dtype, max_batch_size=max_batch_size)


def prompt(length: int, salt: int = 0) -> list[int]:
    """Token ids over the whole vocabulary."""
    return hash_prompt(f"small/{salt}", length, CONFIG.vocab_size)


def greedy(max_new_tokens: int) -> SamplingParams:
    """Greedy, and on over end-of-text tokens."""
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)


def log_softmax(logits: ArrayLike) -> np.ndarray:
    """Over the last axis, in f64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def write_byte_tokenizer(path: pathlib.Path, *, num_more: int = 0) -> pathlib.Path:
    """A ``tokenizer.json`` whose ids 0 to 255 are bytes, so that hardly a token is a character, and 256 is [EOS].

    ``num_more`` special tokens follow.
    """
    tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([EOS_NAME, *(f"[{index}]" for index in range(num_more))])
    tokenizer.save(str(path))
    return path


@contextlib.contextmanager
def unchecked_types() -> Iterator[None]:
    """Without the types that the test run checks: what a user's wrong argument meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
