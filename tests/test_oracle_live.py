"""Against Hugging Face's GPT-J, run live: models that transformers makes and saves, ours that it loads, the demo model.

Needs the extra ``oracle``. PyTorch is imported inside the fixtures, so that other runs collect this file without it,
while a run that selects the marker fails where it is missing.
"""

import dataclasses
import pathlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerances
from golden_cases import NEW_TOKENS
from hash_weights import hash_prompt

from kogpt_jax import KoGPT, SamplingParams, demo
from kogpt_jax.config import Dtype

pytestmark = pytest.mark.oracle

RAGGED_LENGTHS = (1, 5, 16, 31, 64, 90)
DEMO_PROMPTS = (
    "대한민국의 수도는",
    "오늘 아침에",
    "그는 문을 열고",
    "과학자들은 새로운",
    "옛날 어느 마을에",
    "한국어는",
    "경제 성장이",
    "바다에서 돌아온",
    "1950년 6월",
    "그녀가 말했다.",
)


@dataclasses.dataclass(frozen=True)
class LiveCase:
    """A model made by transformers: its configuration, and how it is saved."""

    name: str
    seed: int
    config: dict[str, Any]
    stored_dtype: str = "float32"
    max_shard_size: str = "1GB"


CASES = (
    # KoGPT's proportions: heads of 256 of which 64 are rotary, FFN 4 x D, the whole context, weights in fp16, shards.
    LiveCase(
        "kogpt_miniature",
        0,
        {"vocab_size": 2016, "n_positions": 2048, "n_embd": 512, "n_layer": 4, "n_head": 2, "rotary_dim": 64},
        stored_dtype="float16",
        max_shard_size="4MB",
    ),
    LiveCase(
        "narrow_ffn",
        1,
        {
            "vocab_size": 301,
            "n_positions": 200,
            "n_embd": 96,
            "n_layer": 3,
            "n_head": 3,
            "rotary_dim": 20,
            "n_inner": 50,
        },
    ),
    LiveCase(
        "one_head_bf16",
        2,
        {"vocab_size": 777, "n_positions": 160, "n_embd": 64, "n_layer": 2, "n_head": 1, "rotary_dim": 64},
        stored_dtype="bfloat16",
    ),
)


@dataclasses.dataclass(frozen=True)
class Live:
    """A case on both sides: the directory that transformers wrote, its model in f32, and ours."""

    case: LiveCase
    directory: pathlib.Path
    hf_model: Any
    engine: KoGPT

    def prompt(self, length: int) -> list[int]:
        return hash_prompt(self.case.name, length, self.case.config["vocab_size"])


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    import torch

    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def oracle(torch: ModuleType) -> ModuleType:
    """``load`` and ``greedy`` of the script that makes the goldens."""
    import make_goldens

    return make_goldens


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def live(
    request: pytest.FixtureRequest, torch: ModuleType, oracle: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Live:
    import transformers

    case: LiveCase = request.param
    directory = tmp_path_factory.mktemp(case.name)
    torch.manual_seed(case.seed)
    # Wider than transformers' 0.02, which leaves a small model's logits nearly flat.
    config = transformers.GPTJConfig(
        **case.config, initializer_range=1.2 / case.config["n_embd"] ** 0.5, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPTJForCausalLM(config)
    with torch.no_grad():  # transformers starts biases at 0 and LayerNorm at 1, where many a mistake would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(
                    float(name.endswith(("ln_1.weight", "ln_f.weight"))) + 0.1 * torch.randn_like(parameter)
                )
    model.to(getattr(torch, case.stored_dtype)).save_pretrained(directory, max_shard_size=case.max_shard_size)
    return Live(case, directory, oracle.load(directory), KoGPT.from_pretrained(directory, dtype="fp32"))


def hf_logits(torch: ModuleType, model: Any, prompt: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0].float().numpy()


def check_greedy(torch: ModuleType, oracle: ModuleType, engine: KoGPT, model: Any, prompts: list[list[int]]) -> None:
    """Greedy text of each prompt alone and of all in one batch, against Hugging Face's of the prompt alone."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    together = engine.generate_ids(prompts, params)
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            expected = oracle.greedy(model, prompt, NEW_TOKENS, None)
        (alone,) = engine.generate_ids([prompt], params)
        for completion, how in ((alone, "alone"), (together[index], "in a batch")):
            what = f"prompt {index} {how}"
            tolerances.assert_same_greedy(completion.token_ids, expected["tokens"], expected["gaps"], what)
            if tuple(completion.token_ids) == tuple(expected["tokens"]):
                tolerances.assert_close(completion.logprobs, expected["logprobs"], tolerances.LOGPROBS_VS_HF, what)


def test_logits(live: Live, torch: ModuleType) -> None:
    for length in (1, 16, 63, 120):
        expected = hf_logits(torch, live.hf_model, live.prompt(length))
        tolerances.assert_close(
            live.engine.logits(live.prompt(length)), expected, tolerances.LOGITS_VS_HF, f"prompt of {length}"
        )


def test_greedy_text(live: Live, torch: ModuleType, oracle: ModuleType) -> None:
    check_greedy(torch, oracle, live.engine, live.hf_model, [live.prompt(length) for length in RAGGED_LENGTHS])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sixteen_bit_logits_err_no_more_than_twice_hugging_faces(live: Live, torch: ModuleType, dtype: Dtype) -> None:
    """The kernels' rule for the whole model: the error against f32 is at most twice the oracle's in the same dtype."""
    import transformers

    prompt = live.prompt(64)
    exact = hf_logits(torch, live.hf_model, prompt)
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    rounded_model = transformers.GPTJForCausalLM.from_pretrained(
        live.directory, dtype=torch_dtype, attn_implementation="eager"
    )
    hf_error = tolerances.relative_error(hf_logits(torch, rounded_model, prompt), exact)
    engine = KoGPT.from_pretrained(live.directory, dtype=dtype)
    tolerances.assert_close(
        engine.logits(prompt), exact, tolerances.twice_the_oracles_error(hf_error, dtype), f"logits in {dtype}"
    )


def test_hugging_face_loads_what_we_save(
    live: Live, torch: ModuleType, oracle: ModuleType, tmp_path: pathlib.Path
) -> None:
    live.engine.save_pretrained(tmp_path / "saved")
    again = oracle.load(tmp_path / "saved")  # refuses missing and unexpected keys
    for key, value in live.hf_model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    ours, theirs = again.config.to_dict(), live.hf_model.config.to_dict()
    assert {key: ours[key] for key in live.case.config} == {key: theirs[key] for key in live.case.config}
    prompt = live.prompt(33)
    np.testing.assert_array_equal(hf_logits(torch, again, prompt), hf_logits(torch, live.hf_model, prompt))


def test_demo_model(torch: ModuleType, oracle: ModuleType) -> None:
    engine = KoGPT.from_pretrained("demo", dtype="fp32")
    model = oracle.load(demo.DIRECTORY)
    assert engine.tokenizer is not None
    prompts = [engine.tokenizer.encode(text) for text in DEMO_PROMPTS]
    for prompt in prompts:
        tolerances.assert_close(
            engine.logits(prompt), hf_logits(torch, model, prompt), tolerances.LOGITS_VS_HF, f"prompt {prompt}"
        )
    check_greedy(torch, oracle, engine, model, prompts)
