"""w8a16 and w8a8 from the leaves to the text: what is rounded, the cache of quantised weights, the demo model."""

import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import test_checkpoint
import tolerances
from hash_weights import write_checkpoint
from small_model import KERNEL_CONFIG, greedy, prompt
from test_checkpoint import run_script

from custom_ops import numerics, quantize_weight
from kogpt_jax import KoGPT, SamplingParams, checkpoint, decoding, kv_cache, model, quantized_cache
from kogpt_jax.config import ModelConfig, Quant
from kogpt_jax.errors import InputError
from kogpt_jax.model import model_def
from kogpt_jax.packing import pack, stack
from kogpt_jax.sharding import make_mesh

REPOSITORY = pathlib.Path(__file__).parents[1]
MATRICES = ("w_in", "w_out", "lm_head")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint whose sizes fit the kernels."""
    directory = tmp_path_factory.mktemp("kernels")
    write_checkpoint(directory, KERNEL_CONFIG.to_hf_dict(), salt="kernels")
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where quantised weights are kept: empty before each test."""
    monkeypatch.setattr(quantized_cache, "directory", lambda: tmp_path / "quantized")
    return tmp_path / "quantized"


def by_path(config: ModelConfig, leaves) -> dict[str, np.ndarray]:
    params = model_def(config).params
    return {param.path: np.asarray(leaf) for param, leaf in zip(params, leaves, strict=True)}


def dequantized(engine: KoGPT) -> KoGPT:
    """An f32 model over the values that a quantised one's weights stand for."""
    leaves = by_path(engine.config, engine.leaves)
    config = dataclasses.replace(engine.config, dtype="fp32", quant="none")
    real = []
    for param in model_def(config).params:
        leaf = leaves[param.path].astype(np.float32)
        real.append(jax.device_put(leaf * leaves.get(f"{param.path}_scale", np.float32(1))))
    return KoGPT(config, real, engine.mesh)


# -- What is rounded, and how -----------------------------------------------------------------------------------------


def test_each_output_has_one_scale_over_all_of_its_inputs(directory):
    """Attention's and the FFN's part of ``w_out`` share it; everything but the matrices stays as it is."""
    plain = KoGPT.from_pretrained(directory, dtype="fp32")
    engine = KoGPT.from_pretrained(directory, dtype="fp32", quant="w8a16")
    weights, leaves = by_path(plain.config, plain.leaves), by_path(engine.config, engine.leaves)
    num_matrices = 0
    for path, weight in weights.items():
        if path.rpartition(".")[2] not in MATRICES:
            np.testing.assert_array_equal(leaves.pop(path), weight)
            continue
        num_matrices += 1
        qvalue, scale = leaves.pop(path), leaves.pop(f"{path}_scale")
        assert qvalue.dtype == np.int8
        assert scale.dtype == np.float32
        np.testing.assert_allclose(scale, np.abs(weight).max(axis=-1, keepdims=True) / 127, rtol=1e-6)
        assert np.abs(qvalue.astype(int)).max(axis=-1).min() == 127
        assert (np.abs(qvalue * scale - weight) <= 0.5001 * scale).all()
    assert num_matrices == 2 * KERNEL_CONFIG.num_layers + 1
    assert not leaves


def test_random_models_are_those_of_the_unquantised_seed():
    plain = KoGPT.from_random(KERNEL_CONFIG, seed=3)
    config = dataclasses.replace(KERNEL_CONFIG, quant="w8a16")
    engine = KoGPT.from_random(config, seed=3)
    weights, leaves = by_path(plain.config, plain.leaves), by_path(config, engine.leaves)
    for path in ("embedding", "blocks.1.b_ffn_in"):
        np.testing.assert_array_equal(leaves[path], weights[path])
    scale = leaves["blocks.1.w_out_scale"]
    assert (np.abs(leaves["blocks.1.w_out"] * scale - weights["blocks.1.w_out"]) <= 0.5001 * scale).all()


def test_a_quantised_model_is_not_saved(directory, tmp_path):
    engine = KoGPT.from_pretrained(directory, dtype="fp32", quant="w8a16", keep_quantized=False)
    with pytest.raises(InputError, match="w8a16 cannot be saved"):
        engine.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -- Logits and text --------------------------------------------------------------------------------------------------


def error(logits: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square, relative to the expected logits': what one outlier does not decide."""
    return float(np.sqrt(np.mean(np.square(logits - expected)) / np.mean(np.square(expected))))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_logits_lose_no_more_than_quantising_costs(directory, dtype):
    """Against the unquantised model in f32, at most 1.1 times what the quantised weights in f32 lose; of bf16 what its
    own activations lose is allowed besides."""
    tokens = prompt(100)
    expected = KoGPT.from_pretrained(directory, dtype="fp32").logits(tokens)
    engine = KoGPT.from_pretrained(directory, dtype=dtype, quant="w8a16")
    oracle = dequantized(engine)
    cost = error(oracle.logits(tokens), expected)
    of_dtype = 0.0
    if dtype == "bf16":
        of_dtype = error(KoGPT.from_pretrained(directory, dtype=dtype).logits(tokens), expected)
    assert 1e-4 < cost < 0.1
    assert error(engine.logits(tokens), expected) <= 1.1 * np.hypot(cost, of_dtype)
    if dtype == "fp32":
        tolerances.assert_close(engine.logits(tokens), oracle.logits(tokens), tolerances.LOGITS_VS_HF)


@pytest.mark.parametrize("tile_size", [1, 1000, 7000, 1 << 24])
def test_tiles_that_divide_nothing(monkeypatch, tile_size):
    """Tiles of one output, of some, and of half of them."""
    monkeypatch.setattr(model, "TILE_SIZE", tile_size)
    rng = np.random.default_rng(0)
    weight = quantize_weight(jnp.asarray(rng.normal(size=(337, 48)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(2, 5, 48)), jnp.float32)
    expected = np.asarray(x, np.float64) @ (np.asarray(weight.qvalue, np.float64) * weight.scale).T
    tolerances.assert_close(model.dense(x, weight, jnp.float32), expected, tolerances.MODULE["fp32"])
    assert model.dense(x.astype(jnp.bfloat16), weight, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("phase", ["prefill", "score"])
def test_no_more_than_a_layer_is_converted_at_a_time(phase):
    """Temporary memory does not grow with the layers."""
    temporary = []
    for num_layers in (2, 5):
        config = dataclasses.replace(KERNEL_CONFIG, num_layers=num_layers, model_dim=256, ffn_dim=1024, quant="w8a16")
        mesh, definition = make_mesh(), model_def(config)
        leaves = [jax.ShapeDtypeStruct(param.shape, param.dtype) for param in definition.params]
        args: tuple[Any, ...] = (stack(pack([prompt(16)])),)
        if phase == "prefill":
            args = (kv_cache.make_kv_cache(config, mesh, 1, 64), jnp.zeros((1, config.model_dim)), *args)
        compiled = getattr(decoding, phase).lower(leaves, *args, definition=definition, mesh=mesh).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] - temporary[0] < 4 * 256 * 1024  # of a layer's 768k weights in f32


@pytest.mark.parametrize("implementation", ["reference", pytest.param("ffi", marks=pytest.mark.host)])
@pytest.mark.parametrize("quant", ["none", "w8a16"])
def test_decoding_is_the_forward_over_the_whole_text(directory, quant, implementation):
    """Ragged prompts, through pages of 64 tokens; by both implementations."""
    engine = KoGPT.from_pretrained(directory, dtype="fp32", quant=quant, implementation=implementation)
    prompts = [prompt(length, length) for length in (1, 13, 60, 64, 100)]
    for row, completion in zip(prompts, engine.generate_ids(prompts, greedy(40)), strict=True):
        text = [*row, *completion.token_ids]
        logits = engine.logits(text[:-1])[len(row) - 1 :]
        logprobs = small_model.log_softmax(logits)[np.arange(40), completion.token_ids]
        tolerances.assert_close(completion.logprobs, logprobs, tolerances.CACHED_VS_WHOLE["fp32"], f"{len(row)}")
        assert np.argmax(logits, axis=-1).tolist() == list(completion.token_ids)


@pytest.mark.host
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("quant", ["none", "w8a16"])
def test_kernels_in_16_bits(directory, quant, dtype):
    """Log-probabilities of a text, read token by token, by the kernels and by XLA: as near to f32 as each other."""
    rows = [prompt(30, salt) for salt in range(3)]
    oracle = dequantized(KoGPT.from_pretrained(directory, dtype="fp32", quant=quant))
    completions = {}
    for implementation in ("reference", "ffi"):
        engine = KoGPT.from_pretrained(directory, dtype=dtype, quant=quant, implementation=implementation)
        completions[implementation] = engine.generate_ids(rows, greedy(12))
    errors = {}
    for implementation, found in completions.items():
        texts = [[*row, *completion.token_ids] for row, completion in zip(rows, found, strict=True)]
        expected = [score.logprobs[len(row) :] for row, score in zip(rows, oracle.score_ids(texts), strict=True)]
        errors[implementation] = error(np.array([c.logprobs for c in found]), np.array(expected, np.float64))
    assert errors["ffi"] <= 2 * errors["reference"] + {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]


# -- w8a8 -------------------------------------------------------------------------------------------------------------


def test_w8a8_rounds_the_activations_of_the_layers_products(directory, monkeypatch):
    """Against a model in f32 over the same weights whose activations are rounded in the open."""
    tokens = prompt(70)
    engine = KoGPT.from_pretrained(directory, dtype="fp32", quant="w8a8")
    logits = engine.logits(tokens)
    oracle = dequantized(engine)
    exact = oracle.logits(tokens)
    num_rounded = 0

    def rounded(x, *args, layer_norm=None, **options):
        nonlocal num_rounded
        num_rounded += 1
        if layer_norm is not None:
            x = numerics.layer_norm(x, *layer_norm)
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return plain(jnp.round(x / scale) * scale, *args, **options)

    plain = model.prefill_linear
    monkeypatch.setattr(model, "prefill_linear", rounded)
    jax.clear_caches()
    try:
        expected = oracle.logits(tokens)
    finally:
        jax.clear_caches()
    assert num_rounded == 2 * engine.config.num_layers
    assert error(expected, exact) > 1e-3
    # An activation that lies between two integers may be rounded to either; each such is 1 / 127 of its row's largest.
    # XLA's versions sum in other orders: 0.12 was seen with one.
    assert error(logits, expected) < 0.2 * error(expected, exact)


def test_w8a8_costs_little_and_without_kernels_decodes_as_w8a16(directory):
    tokens = prompt(100)
    expected = KoGPT.from_pretrained(directory, dtype="fp32").logits(tokens)
    errors = {}
    engines = {}
    for quant in ("w8a16", "w8a8"):
        engines[quant] = KoGPT.from_pretrained(directory, dtype="fp32", quant=quant, implementation="reference")
        errors[quant] = error(engines[quant].logits(tokens), expected)
    assert errors["w8a16"] < errors["w8a8"] < 0.1
    assert quantized_cache.size()[0] == 1  # one copy of the weights

    states = {}
    requests = engines["w8a16"]._requests([prompt(5, salt) for salt in range(3)], greedy(9))
    for quant, engine in engines.items():
        state, _ = engines["w8a16"]._prefill(requests)
        states[quant] = decoding.decode_loop(engine.leaves, state, num_steps=8, **engine._static)[1]
    jax.tree.map(np.testing.assert_array_equal, states["w8a16"], states["w8a8"])


# -- The cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of leaves that are quantised from now on."""
    paths: list[str] = []
    quantized_as = model.quantized_as

    def watched(specs, path, leaf, mesh):
        paths.append(path)
        return quantized_as(specs, path, leaf, mesh)

    monkeypatch.setattr(checkpoint, "quantized_as", watched)
    return paths


def load(directory: pathlib.Path, quant: Quant = "w8a16", **options) -> KoGPT:
    return KoGPT.from_pretrained(directory, quant=quant, **{"dtype": "fp32", **options})


def copy_of(directory: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


NUM_MATRICES = 2 * KERNEL_CONFIG.num_layers + 1


def test_the_second_load_quantises_nothing(directory, cache, quantizations):
    first = load(directory)
    assert len(quantizations) == NUM_MATRICES
    second = load(directory)
    assert len(quantizations) == NUM_MATRICES
    for leaf, same in zip(first.leaves, second.leaves, strict=True):
        np.testing.assert_array_equal(leaf, same)
    (entry,) = cache.iterdir()
    record = json.loads((entry / "config.json").read_text())["quantization_config"]
    assert (record["scheme"], record["dtype"], record["source"]) == ("w8a16", "fp32", str(directory.resolve()))
    tensors = test_checkpoint.stored(entry)
    assert tensors["transformer.h.1.mlp.fc_out.weight"].dtype == np.int8
    for part in ("attn.out_proj", "mlp.fc_out"):
        scale = tensors[f"transformer.h.1.{part}.weight_scale"]
        np.testing.assert_array_equal(scale[None, None], by_path(first.config, first.leaves)["blocks.1.w_out_scale"])
    with pytest.raises(InputError, match="quantization_config is not supported"):
        KoGPT.from_pretrained(entry)


def test_another_dtype_source_or_content_is_another_entry(directory, cache, quantizations, tmp_path):
    load(directory)
    load(directory, dtype="bf16")
    other = copy_of(directory, tmp_path / "other")
    load(other)
    weights = other / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    load(other)
    assert len(quantizations) == 4 * NUM_MATRICES
    assert quantized_cache.size()[0] == len(list(cache.iterdir())) == 4


def test_it_can_be_switched_off(directory, cache, quantizations):
    for _ in range(2):
        load(directory, keep_quantized=False)
    assert len(quantizations) == 2 * NUM_MATRICES
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["shorter", "no weights", "no config", "other config"])
def test_a_damaged_entry_is_made_anew(directory, cache, quantizations, caplog, damage):
    expected = load(directory).leaves
    (entry,) = cache.iterdir()
    weights, config = entry / "model.safetensors", entry / "config.json"
    if damage == "shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text("{}")
    for number_of_loads in (2, 2):  # the second finds it whole again
        for leaf, same in zip(load(directory).leaves, expected, strict=True):
            np.testing.assert_array_equal(leaf, same)
        assert len(quantizations) == number_of_loads * NUM_MATRICES
    assert len(list(cache.iterdir())) == 1
    messages = [record.getMessage() for record in caplog.records if record.name == "kogpt_jax"]
    assert len(messages) == (1 if "config" not in damage else 0)
    assert all("made anew" in message and "\n" not in message for message in messages)


def test_what_a_killed_process_left_is_not_used(directory, cache, quantizations):
    load(directory)
    (entry,) = cache.iterdir()
    half = cache / f".{entry.name}.abc"
    entry.rename(half)
    (half / "model.safetensors").write_bytes(b"half")
    load(directory)
    assert len(quantizations) == 2 * NUM_MATRICES
    assert half.is_dir()  # another process may still be at it
    os.utime(half, (0, 0))
    entry.joinpath("config.json").unlink()
    load(directory)
    assert [path.name for path in cache.iterdir()] == [entry.name]


@pytest.mark.parametrize("fails_at", [1, 20])
def test_a_full_disk_is_one_warning(directory, cache, caplog, monkeypatch, fails_at):
    fetch, calls = checkpoint._fetch, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        return fetch(*arguments)

    monkeypatch.setattr(checkpoint, "_fetch", failing)
    with caplog.at_level(logging.WARNING, "kogpt_jax"):
        engine = load(directory)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "kogpt_jax"]
    assert message.startswith("quantised weights are not kept: ")
    assert "No space left" in message
    assert "\n" not in message
    assert not cache.exists()
    assert len(engine.generate_ids([prompt(5)], greedy(3))[0].token_ids) == 3


def test_of_two_processes_the_first_wins(directory, cache, caplog, monkeypatch):
    """The other finishes while this one writes."""
    write_leaves = checkpoint.write_leaves

    def overtaken(*arguments):
        monkeypatch.setattr(checkpoint, "write_leaves", write_leaves)
        load(directory)
        write_leaves(*arguments)

    monkeypatch.setattr(checkpoint, "write_leaves", overtaken)
    load(directory)
    assert len(list(cache.iterdir())) == 1
    assert not [record for record in caplog.records if record.name == "kogpt_jax"]


@pytest.mark.slow
def test_host_memory_while_quantising(tmp_path):
    """As while loading: twice the largest tensor and a fixed amount beyond the arrays that are kept, most of it XLA's
    compiler's (95 or 215 MB were seen, for models of 0.6 and 1.2 GB alike)."""
    script = """
        import pathlib, sys
        from benchmarks import bench_load

        directory = pathlib.Path(sys.argv[1])
        config = bench_load.config_of_size(900e6, model_dim=1024, vocab_size=8000)
        bench_load.write_checkpoint(directory / "model", config, seed=0)
        print(bench_load.largest_tensor_bytes(config))
    """
    largest = int(run_script(script, tmp_path))
    script = """
        import sys
        from benchmarks import bench_load

        result = bench_load.measure_load(sys.argv[1], "fp32", "w8a16")
        print(result["loaded_bytes"], result["peak_beyond_arrays_bytes"])
    """
    for _ in range(2):  # quantised and kept, then loaded
        loaded, peak = map(int, run_script(script, tmp_path / "model", KOGPT_CACHE_DIR=str(tmp_path / "cache")).split())
        assert loaded > 2 * largest + 260e6
        assert peak <= 2 * largest + 260e6
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 1


# -- The demo model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_model_agrees_with_fp32_on_its_own_texts():
    """Teacher forcing on sampled reviews: the text itself is no part of the repository. Held-out text is in
    test_evaluation.py."""
    reference = KoGPT.from_pretrained("demo", dtype="fp32")
    params = [SamplingParams(max_new_tokens=60, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(32)]
    texts = [[1, *completion.token_ids] for completion in reference.generate_ids([[1]] * 32, params)]
    engine = KoGPT.from_pretrained("demo", dtype="fp32", quant="w8a16")
    nats = [-np.mean([score.logprobs[1:] for score in model.score_ids(texts)]) for model in (reference, engine)]
    agreement = np.mean(
        [np.argmax(engine.logits(text), axis=-1) == np.argmax(reference.logits(text), axis=-1) for text in texts]
    )
    print(np.exp(nats), agreement)
    assert abs(np.expm1(nats[1] - nats[0])) < 2e-3
    assert 0.97 < agreement < 1
