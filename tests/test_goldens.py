"""Logits and greedy text against outputs that Hugging Face GPT-J made beforehand (make_goldens.py): without PyTorch."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Literal

import numpy as np
import pytest
import tolerances
from golden_cases import CASES, GOLDENS, NEW_TOKENS, GoldenCase

from kogpt_jax import Completion, KoGPT, SamplingParams
from kogpt_jax.config import Dtype, ModelConfig, Quant
from kogpt_jax.errors import InputError
from kogpt_jax.model import model_def

MANIFEST = json.loads((GOLDENS / "manifest.json").read_text(encoding="utf-8"))
CHEAPEST_CASE = next(case for case in CASES if case.name == "one_layer")  # to compile
PERTURBED_CASE = next(case for case in CASES if case.name == "eos")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A golden, and the engine over the same weights."""

    case: GoldenCase
    weights_sha256: str
    engine: KoGPT
    golden: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    case: GoldenCase = request.param
    directory = tmp_path_factory.mktemp(case.name)
    digest = case.write(directory)
    with np.load(GOLDENS / f"{case.name}.npz") as file:
        golden = dict(file)
    engine = KoGPT.from_pretrained(directory, dtype="fp32", implementation="reference")
    return Loaded(case, digest, engine, golden)


def check_completion(completion: Completion, loaded: Loaded, index: int) -> None:
    """One greedy completion, made with ``ignore_eos``, against the golden: tokens, log-probabilities, where it ends."""
    golden, what = loaded.golden, f"{loaded.case.name} prompt {index}"
    tokens, gaps = golden[f"tokens_{index}"], golden[f"gaps_{index}"]
    tolerances.assert_same_greedy(completion.token_ids, tokens, gaps, what)
    # The goldens hold no tie, so that this compares whole rows.
    tolerances.assert_close(completion.logprobs, golden[f"logprobs_{index}"], tolerances.LOGPROBS_VS_HF, what)
    assert completion.finish_reason == "length"


def prompts_for_logits(case: GoldenCase) -> list[int]:
    """Which prompts' logits a test compares. Every prompt bucket compiles anew: all of them run for one case only, for
    the others the shortest bucket and the longest prompt."""
    lengths = case.prompt_lengths
    return [i for i, length in enumerate(lengths) if case is CHEAPEST_CASE or length <= 16 or length == max(lengths)]


def test_goldens_are_complete_and_small() -> None:
    files = {path.name: path for path in GOLDENS.iterdir()}
    assert set(files) == {"manifest.json", *(f"{case.name}.npz" for case in CASES)}
    assert set(MANIFEST["cases"]) == {case.name for case in CASES}
    for case in CASES:
        digest = hashlib.sha256(files[f"{case.name}.npz"].read_bytes()).hexdigest()
        assert digest == MANIFEST["cases"][case.name]["file_sha256"], f"{case.name}.npz is not that of the manifest"
    assert sum(path.stat().st_size for path in files.values()) <= 2_000_000


def test_weights_are_those_of_the_golden(loaded: Loaded) -> None:
    assert loaded.weights_sha256 == MANIFEST["cases"][loaded.case.name]["weights_sha256"]


def test_logits(loaded: Loaded) -> None:
    prompts = loaded.case.prompts()
    for index in prompts_for_logits(loaded.case):
        prompt = prompts[index]
        logits = loaded.engine.logits(prompt)
        assert logits.shape == (len(prompt), loaded.case.vocab_size)
        assert logits.dtype == np.float32
        tolerances.assert_close(
            logits[loaded.case.logit_positions(len(prompt))],
            loaded.golden[f"logits_{index}"],
            tolerances.LOGITS_VS_HF,
            f"{loaded.case.name} prompt {index}",
        )


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [case for case in CASES if case.alone], indirect=True, ids=lambda case: case.name)
def test_greedy_text_of_a_prompt_alone(loaded: Loaded) -> None:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = loaded.case.prompts()
    for length in loaded.case.alone:
        index = loaded.case.prompt_lengths.index(length)
        (completion,) = loaded.engine.generate_ids([prompts[index]], params)
        check_completion(completion, loaded, index)


@pytest.mark.slow
def test_greedy_text_of_a_ragged_batch(loaded: Loaded) -> None:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    completions = loaded.engine.generate_ids(loaded.case.prompts(), params)
    for index, completion in enumerate(completions):
        check_completion(completion, loaded, index)


# What the kernels take; the K of w_out is n_embd + n_inner.
KERNEL_CASES = [
    case
    for case in CASES
    if case.n_embd // case.n_head in (64, 128, 256) and (case.n_embd + (case.n_inner or 4 * case.n_embd)) % 8 == 0
]


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("loaded", KERNEL_CASES, indirect=True, ids=lambda case: case.name)
def test_greedy_text_through_the_kernels(loaded: Loaded) -> None:
    """In f32, by the Host library: the tokens of Hugging Face, in a ragged batch."""
    reference = loaded.engine
    engine = KoGPT(reference.config, reference.leaves, reference.mesh, implementation="ffi")
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for index, completion in enumerate(engine.generate_ids(loaded.case.prompts(), params)):
        check_completion(completion, loaded, index)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loaded", [case for case in CASES if case.eos_token_id is not None], indirect=True, ids=lambda case: case.name
)
def test_greedy_text_ends_at_eos_as_hugging_face_ends(loaded: Loaded) -> None:
    completions = loaded.engine.generate_ids(loaded.case.prompts(), SamplingParams(max_new_tokens=NEW_TOKENS))
    eos_token_ids = loaded.engine.config.eos_token_ids
    for index, completion in enumerate(completions):
        expected = loaded.golden[f"tokens_until_eos_{index}"]
        gaps = loaded.golden[f"gaps_{index}"]
        tolerances.assert_same_greedy(completion.token_ids, expected, gaps, f"{loaded.case.name} prompt {index}")
        assert completion.finish_reason == ("stop" if expected[-1] in eos_token_ids else "length")


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A change of one config field, over unchanged weights, and what it must do."""

    effect: Literal["refused", "logits", "text", "parameters"]
    hf_changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Dtype = "fp32"
    quant: Quant = "none"
    kv_dtype: str | None = None


# Per field of ModelConfig. PERTURBED_CASE has 2 layers of 2 heads of 24, all of it rotary, and an FFN of 4 x 48.
PERTURBATIONS = {
    "vocab_size": [Perturbation("refused", {"vocab_size": 306}), Perturbation("refused", {"vocab_size": 308})],
    "max_len": [Perturbation("text", {"n_positions": 16})],
    "model_dim": [Perturbation("refused", {"n_embd": 24})],
    "num_layers": [Perturbation("refused", {"n_layer": 1}), Perturbation("refused", {"n_layer": 3})],
    "num_heads": [Perturbation("logits", {"n_head": 1})],
    "rotary_dim": [Perturbation("logits", {"rotary_dim": 22}), Perturbation("logits", {"rotary_dim": 2})],
    "ffn_dim": [Perturbation("refused", {"n_inner": 191}), Perturbation("refused", {"n_inner": 193})],
    "layer_norm_epsilon": [Perturbation("logits", {"layer_norm_epsilon": 1e-6})],
    "eos_token_ids": [Perturbation("text", {"eos_token_id": None})],
    "dtype": [Perturbation("logits", dtype="bf16"), Perturbation("logits", dtype="fp16")],
    "quant": [Perturbation("logits", quant="w8a16"), Perturbation("logits", quant="w8a8")],
    "kv_dtype": [Perturbation("logits", kv_dtype="int8")],
    "has_multiplier": [Perturbation("parameters")],  # which are made with it (test_smoothing.py)
}


@pytest.fixture(scope="module")
def unperturbed(tmp_path_factory: pytest.TempPathFactory) -> KoGPT:
    directory = tmp_path_factory.mktemp("unperturbed")
    PERTURBED_CASE.write(directory)
    return KoGPT.from_pretrained(directory, dtype="fp32")


def outcomes(engine: KoGPT) -> list[tuple[tuple[int, ...], str]]:
    """Tokens and finish reasons of two greedy texts of a prompt of 16 tokens whose first token is EOS: one that may end
    there, one that may not and goes on to 2 tokens."""
    prompt = next(prompt for prompt in PERTURBED_CASE.prompts() if len(prompt) == 16)
    params = [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=2, ignore_eos=True)]
    completions = engine.generate_ids([prompt, prompt], params)
    return [(completion.token_ids, completion.finish_reason) for completion in completions]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_config_field_matters(field: str, unperturbed: KoGPT, tmp_path: pathlib.Path) -> None:
    assert field in PERTURBATIONS, f"ModelConfig.{field} has no perturbation here: say what it must change"
    for number, perturbation in enumerate(PERTURBATIONS[field]):
        directory = tmp_path / str(number)
        PERTURBED_CASE.write(directory, **perturbation.hf_changes)
        if perturbation.effect == "refused":
            with pytest.raises(InputError):
                KoGPT.from_pretrained(directory, dtype=perturbation.dtype)
            continue
        if perturbation.effect == "parameters":
            config = unperturbed.config
            changes: dict[str, Any] = {field: not getattr(config, field)}
            other = dataclasses.replace(config, **changes)
            assert model_def(other).params != model_def(config).params
            continue
        engine = KoGPT.from_pretrained(
            directory, dtype=perturbation.dtype, quant=perturbation.quant, kv_dtype=perturbation.kv_dtype
        )
        changed = [
            name.name
            for name in dataclasses.fields(ModelConfig)
            if getattr(engine.config, name.name) != getattr(unperturbed.config, name.name)
        ]
        assert changed == [field], f"{perturbation} changes {changed}"
        if perturbation.effect == "text":
            assert outcomes(engine) != outcomes(unperturbed), f"{perturbation} changes no text"
        else:
            prompt = PERTURBED_CASE.prompts()[4]
            error = tolerances.relative_error(engine.logits(prompt), unperturbed.logits(prompt))
            assert error >= tolerances.VISIBLE_CHANGE, f"{perturbation} changes the logits by {error:.2g} only"
