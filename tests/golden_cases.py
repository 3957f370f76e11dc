"""The shapes of the goldens: together they differ in everything that a GPT-J ``config.json`` can say."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from hash_weights import hash_prompt, write_checkpoint

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NEW_TOKENS = 64
# Around the powers of two at which prompt buckets change, and a prompt of one token.
PROMPT_LENGTHS = (1, 2, 7, 16, 17, 33, 64, 65)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """One small model, its weights' salt and its prompts."""

    name: str
    vocab_size: int = 503
    n_positions: int = 256
    n_embd: int
    n_layer: int = 2
    n_head: int
    rotary_dim: int
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | Sequence[int] | None = None
    stored_dtype: str = "fp32"
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
    alone: tuple[int, ...] = ()  # lengths of the prompts that run alone too; each costs a test two compilations

    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` of this case."""
        eos = self.eos_token_id
        return {
            "architectures": ["GPTJForCausalLM"],
            "model_type": "gptj",
            "activation_function": "gelu_new",
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "rotary_dim": self.rotary_dim,
            "n_inner": self.n_inner,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "bos_token_id": None,
            "eos_token_id": list(eos) if isinstance(eos, Sequence) else eos,
            "tie_word_embeddings": False,
        }

    def write(self, directory: pathlib.Path, **changes: Any) -> str:
        """Writes this case's checkpoint; ``changes`` go into ``config.json`` alone, for tests that perturb it."""
        digest = write_checkpoint(directory, self.hf_config(), self.stored_dtype, salt=self.name)
        if changes:
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
        return digest

    def prompts(self) -> list[list[int]]:
        return [hash_prompt(self.name, length, self.vocab_size) for length in self.prompt_lengths]

    def max_new_tokens(self, prompt_length: int) -> int:
        """What fits ``n_positions``; the last token is sampled but never read, so it needs no position."""
        return min(NEW_TOKENS, self.n_positions - prompt_length + 1)

    def logit_positions(self, prompt_length: int) -> list[int]:
        """Where logits are stored: up to four positions, the first and the last among them."""
        return sorted({0, prompt_length // 3, 2 * prompt_length // 3, prompt_length - 1})


CASES = (
    GoldenCase(name="head64", n_embd=128, n_head=2, rotary_dim=32, alone=(33,)),
    GoldenCase(
        name="head128_all_rotary",
        vocab_size=257,
        n_embd=128,
        n_head=1,
        rotary_dim=128,
        n_inner=200,
        layer_norm_epsilon=1e-12,
    ),
    GoldenCase(
        name="head256_fp16", vocab_size=640, n_embd=512, n_head=2, rotary_dim=64, stored_dtype="fp16", alone=(17,)
    ),
    GoldenCase(
        name="head24",
        vocab_size=331,
        n_embd=72,
        n_layer=3,
        n_head=3,
        rotary_dim=10,
        n_inner=100,
        layer_norm_epsilon=1e-3,
        alone=(2,),
    ),
    GoldenCase(
        name="one_layer", vocab_size=997, n_embd=64, n_layer=1, n_head=4, rotary_dim=16, n_inner=64, alone=(1, 16, 65)
    ),
    GoldenCase(
        name="six_layers_bf16",
        n_positions=192,
        n_embd=96,
        n_layer=6,
        n_head=6,
        rotary_dim=8,
        n_inner=300,
        stored_dtype="bf16",
    ),
    # Rotary angles reach 2000 here, where one ulp of f32 is 1e-4: an error that grows with the position shows.
    GoldenCase(
        name="long_context",
        n_positions=2048,
        n_embd=64,
        n_head=1,
        rotary_dim=32,
        prompt_lengths=(3, 500, 1980),
        alone=(1980,),
    ),
    # Prompts of 17 tokens and more run into the end of the context.
    GoldenCase(name="short_context", n_positions=79, n_embd=80, n_head=5, rotary_dim=12, n_inner=333, alone=(65,)),
    GoldenCase(name="eos", vocab_size=307, n_embd=48, n_head=2, rotary_dim=24, eos_token_id=9),
    GoldenCase(name="two_eos", vocab_size=499, n_embd=80, n_head=2, rotary_dim=2, eos_token_id=(335, 224)),
)
