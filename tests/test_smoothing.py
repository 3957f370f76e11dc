"""SmoothQuant: it changes no function, it takes outliers out of activations, and what it makes is kept."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import test_checkpoint
import tolerances
from hash_weights import write_checkpoint
from small_model import KERNEL_CONFIG, prompt
from test_checkpoint import run_script
from test_quantize import by_path, dequantized, error

from custom_ops import numerics
from kogpt_jax import KoGPT, checkpoint, decoding, kv_cache, model, quantized_cache, smoothing
from kogpt_jax.config import ModelConfig
from kogpt_jax.errors import InputError
from kogpt_jax.evaluation import add_outliers
from kogpt_jax.model import model_def, random_leaves
from kogpt_jax.packing import pack
from kogpt_jax.sharding import make_mesh

PLAIN = dataclasses.replace(KERNEL_CONFIG, has_multiplier=False)
SMOOTHED = dataclasses.replace(KERNEL_CONFIG, has_multiplier=True)
DIM, FFN = PLAIN.model_dim, PLAIN.ffn_dim
SETTINGS = smoothing.Settings(num_tokens=256, window=64, num_rows=64)


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where quantised weights are kept: empty before each test."""
    monkeypatch.setattr(quantized_cache, "directory", lambda: tmp_path / "quantized")
    return tmp_path / "quantized"


def leaves_of(config: ModelConfig = PLAIN) -> dict[str, jax.Array]:
    """Larger than a trained model's, so that the logits depend on all of them."""
    leaves = random_leaves(config, make_mesh(), seed=1, std=0.1)
    return {param.path: leaf for param, leaf in zip(model_def(config).params, leaves, strict=True)}


def engine_of(config: ModelConfig, leaves: dict[str, jax.Array], implementation="auto") -> KoGPT:
    ordered = [leaves[param.path] for param in model_def(config).params]
    return KoGPT(config, ordered, make_mesh(), implementation=implementation)


def quantized(leaves: dict[str, jax.Array], implementation="reference") -> KoGPT:
    """The w8a8 model over unquantised leaves with a multiplier."""
    config = dataclasses.replace(SMOOTHED, quant="w8a8")
    made = smoothing.quantized_leaves(config, dict(leaves), make_mesh())
    return KoGPT(config, made, make_mesh(), implementation=implementation)


def stepped(engine: KoGPT, tokens: list[int]) -> np.ndarray:
    """Logits of every position, each token read by a decode step."""
    static = {"definition": engine._definition, "mesh": engine.mesh}
    cache = kv_cache.make_kv_cache(engine.config, engine.mesh, 1, len(tokens))
    return np.asarray(decoding.stepped_logits(engine.leaves, cache, np.array([tokens], np.int32), **static))[0]


def random_factors(parts: tuple[str, ...], seed: int) -> dict[str, np.ndarray]:
    """Powers of two for these inputs of a layer's products, 1 for the others."""
    rng = np.random.default_rng(seed)
    extents = {"norm": DIM, "attention": DIM, "gelu": FFN}
    factors = {
        name: 2.0 ** rng.integers(-4, 5, extent) if name in parts else np.ones(extent)
        for name, extent in extents.items()
    }
    w_out = np.concatenate([factors["attention"], factors["gelu"]])
    return {"w_in": factors["norm"].astype(np.float32), "w_out": w_out.astype(np.float32)}


# -- The function stays -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("norm",), ("attention",), ("gelu",), ("norm", "attention", "gelu")])
def test_rescaling_changes_no_bit_of_the_function(parts):
    """Powers of two, in whole sequences and in decode steps."""
    leaves = leaves_of()
    plain = engine_of(PLAIN, leaves)
    rescaled = dict(leaves)
    for layer in range(PLAIN.num_layers):
        rescaled |= smoothing.rescale_layer(rescaled, layer, PLAIN, **random_factors(parts, layer))
    changed = {path.rpartition(".")[2] for path in leaves if not np.array_equal(leaves[path], rescaled[path])}
    expected = {"norm": {"ln_scale", "ln_bias", "w_in"}, "attention": {"w_in", "w_out"}, "gelu": {"w_out"}}
    assert changed == set().union(*(expected[part] for part in parts))
    assert ("gelu" in parts) == bool((np.asarray(rescaled["blocks.1.w_out_multiplier"])[0, 0, DIM:] != 1).any())
    assert (np.asarray(rescaled["blocks.1.w_out_multiplier"])[0, 0, :DIM] == 1).all()
    engine = engine_of(SMOOTHED, rescaled)
    tokens = prompt(40)
    np.testing.assert_array_equal(engine.logits(tokens), plain.logits(tokens))
    np.testing.assert_array_equal(stepped(engine, tokens), stepped(plain, tokens))


def test_factors_of_any_size_keep_the_function_too():
    """As outliers are added: within what f32 rounds."""
    leaves = leaves_of()
    plain = engine_of(PLAIN, leaves)
    before = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    add_outliers(PLAIN, leaves, 20.0)
    tokens = prompt(40)
    engine = engine_of(SMOOTHED, leaves)
    tolerances.assert_close(engine.logits(tokens), plain.logits(tokens), tolerances.RESCALED)
    for layer in range(PLAIN.num_layers):
        block = f"blocks.{layer}."
        ratio = np.asarray(leaves[block + "ln_scale"]) / before[block + "ln_scale"]
        assert sorted(set(np.round(ratio, 3).ravel())) == [1, 20]
        multiplier = np.asarray(leaves[block + "w_out_multiplier"])[0, 0, DIM:]
        assert np.count_nonzero(np.isclose(multiplier, 20)) == FFN // 32
        rows = np.abs(np.asarray(leaves[block + "w_in"])[0, 0, 2 * DIM : 3 * DIM]).max(axis=1)
        assert np.count_nonzero(rows > 10 * np.median(rows)) == DIM // 32


# -- INT8 products see the multiplier ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", pytest.param("ffi", marks=pytest.mark.host)])
def test_decode_steps_multiply(implementation):
    """Weight-only, against f32 over the same values."""
    leaves = leaves_of()
    add_outliers(PLAIN, leaves, 8.0)
    engine = quantized(leaves, implementation)
    tokens = prompt(30)
    oracle = dequantized(engine)
    logits = stepped(engine, tokens)
    tolerances.assert_close(logits, stepped(oracle, tokens), tolerances.LOGITS_VS_HF)
    without = {name: jnp.ones_like(leaf) if name.endswith("multiplier") else leaf for name, leaf in leaves.items()}
    assert error(stepped(quantized(without, implementation), tokens), logits) > 0.05


def test_whole_sequences_round_what_is_multiplied(monkeypatch):
    """Against a model in f32 over the same weights whose activations are rounded in the open."""
    leaves = leaves_of()
    add_outliers(PLAIN, leaves, 8.0)
    engine = quantized(leaves)
    oracle = dequantized(engine)
    tokens = prompt(70)
    exact, logits = oracle.logits(tokens), engine.logits(tokens)
    plain = model.prefill_linear
    num_multiplied = 0

    def rounded(x, *args, layer_norm=None, k_multiplier=None, **options):
        nonlocal num_multiplied
        if layer_norm is not None:
            x = numerics.layer_norm(x, *layer_norm)
        if k_multiplier is not None:
            num_multiplied += 1
            x = x * k_multiplier
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return plain(jnp.round(x / scale) * scale, *args, **options)

    monkeypatch.setattr(model, "prefill_linear", rounded)
    jax.clear_caches()
    try:
        expected = oracle.logits(tokens)
    finally:
        jax.clear_caches()
    assert num_multiplied == PLAIN.num_layers
    assert error(expected, exact) > 1e-3
    # An activation that lies between two integers may be rounded to either; each such is 1 / 127 of its row's largest.
    assert error(logits, expected) < 0.1 * error(expected, exact)


def test_smoothing_undoes_outliers():
    """In INT8 the model with outliers loses far more than the one without; smoothed, about as little."""
    leaves = leaves_of()
    tokens = prompt(100)
    expected = engine_of(PLAIN, leaves).logits(tokens)
    config = dataclasses.replace(PLAIN, quant="w8a8")
    made = smoothing.quantized_leaves(config, dict(leaves), make_mesh())
    without = error(KoGPT(config, made, make_mesh()).logits(tokens), expected)
    add_outliers(PLAIN, leaves, 40.0)
    with_outliers = error(quantized(leaves).logits(tokens), expected)
    chosen = smoothing.smooth(SMOOTHED, leaves, make_mesh(), [prompt(64, salt) for salt in range(4)], SETTINGS)
    smoothed = error(quantized(leaves).logits(tokens), expected)
    print(without, with_outliers, smoothed)
    assert with_outliers > 3 * without
    assert smoothed < 1.5 * without
    assert len(chosen) == PLAIN.num_layers
    for choices in chosen:
        assert set(choices) == {"w_in", "w_out"}
        for choice in choices.values():
            assert choice.strength in SETTINGS.strengths
            assert choice.error < 0.5 * choice.error_without
    assert error(engine_of(SMOOTHED, leaves).logits(tokens), expected) < 1e-6


# -- The search -------------------------------------------------------------------------------------------------------


def relative_squared_error(rows, weight, factors) -> float:
    """The objective, in f64 by the definition."""

    def rounded(values):
        scale = np.abs(values).max(axis=1, keepdims=True) / 127
        return np.round(values / scale) * scale

    exact = rows @ weight.T
    return float(np.mean((rounded(rows / factors) @ rounded(weight * factors).T - exact) ** 2) / np.mean(exact**2))


def test_the_search_takes_the_least_error():
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(50, 48)), rng.normal(size=(30, 48))
    rows[:, 7] *= 60
    rows, weight = rows.astype(np.float32), weight.astype(np.float32)
    strengths = (0.2, 0.5, 0.9)
    largest = np.abs(rows).max(axis=0)
    choice = smoothing.search(largest, rows, jnp.asarray(weight), strengths)
    errors = {0.0: relative_squared_error(rows, weight, np.ones(48))}
    for strength in strengths:
        factors = smoothing.smoothing_factors(largest, np.abs(weight).max(axis=0), strength)
        errors[strength] = relative_squared_error(rows, weight, factors)
    assert choice.strength == min(errors, key=errors.__getitem__) != 0
    assert choice.error == pytest.approx(errors[choice.strength], rel=1e-2)
    assert choice.error_without == pytest.approx(errors[0.0], rel=1e-2)
    assert choice.factors[7] >= 8 * np.median(choice.factors)


def test_nothing_is_smoothed_where_that_is_best():
    rng = np.random.default_rng(0)
    rows, weight = (127 * rng.choice(np.array([-1, 1], np.float32), (count, 32)) for count in (40, 24))
    weight[:, 3] /= 127  # integers: without smoothing nothing is lost
    choice = smoothing.search(np.abs(rows).max(axis=0), rows, jnp.asarray(weight), (0.3, 0.9))
    assert (choice.strength, choice.error, choice.error_without) == (0.0, 0.0, 0.0)
    assert (choice.factors == 1).all()


def test_factors_are_powers_of_two_and_safe_for_channels_of_zeros():
    largest = np.array([0, 1e-30, 1, 8, 1e30, 3, 0], np.float32)
    weights = np.array([1, 1, 1, 0, 1, 0.5, 0], np.float32)
    for strength in (0.1, 0.5, 0.9):
        factors = smoothing.smoothing_factors(largest, weights, strength)
        assert (np.frexp(factors)[0] == 0.5).all()
        assert (factors[[0, 3, 6]] == 1).all()
        assert factors.max() <= 2**12
        assert factors.min() >= 2**-12
        assert factors[1] < factors[2] < factors[4]
    zeros = np.zeros(4, np.float32)
    assert (smoothing.smoothing_factors(zeros, zeros, 0.5) == 1).all()


def test_a_model_with_dead_channels():
    """Neither a channel that is never active nor weights of zeros make anything that is not finite."""
    leaves = leaves_of()
    leaves["blocks.0.ln_scale"] = leaves["blocks.0.ln_scale"].at[0, 3].set(0)
    leaves["blocks.0.ln_bias"] = leaves["blocks.0.ln_bias"].at[0, 3].set(0)
    leaves["blocks.0.w_in"] = leaves["blocks.0.w_in"].at[0, 0, :, 5].set(0).at[0, 0, 2 * DIM + 4].set(0)
    leaves["blocks.1.w_out"] = jnp.zeros_like(leaves["blocks.1.w_out"])
    expected = engine_of(PLAIN, leaves).logits(prompt(20))
    chosen = smoothing.smooth(PLAIN, leaves, make_mesh(), [prompt(64)], SETTINGS)
    assert chosen[1]["w_out"].error == chosen[1]["w_out"].strength == 0
    np.testing.assert_array_equal(engine_of(SMOOTHED, leaves).logits(prompt(20)), expected)
    assert np.isfinite(quantized(leaves).logits(prompt(20))).all()


@pytest.mark.slow
def test_padding_counts_for_nothing():
    """Windows of several lengths, more of them than fit a batch: the largest magnitudes are those of the tokens."""
    leaves = list(leaves_of().values())
    windows = [prompt(length, length) for length in (30, 64, 5, 17, 64, 1, 64, 33, 64, 9)]
    found = smoothing._collect(PLAIN, leaves, make_mesh(), windows, SETTINGS, False)
    static = {"definition": model_def(PLAIN), "mesh": make_mesh()}
    alone = []
    for window in windows:
        every = np.arange(len(window), dtype=np.int32)
        alone.append(decoding.layer_inputs(leaves, pack([window])[0], every, **static))
    for layer, inputs in enumerate(found):
        for field in (0, 1):
            expected = np.max([np.abs(one[layer][field + 2]).max(axis=0) for one in alone], axis=0)
            np.testing.assert_allclose(inputs[field], expected, rtol=1e-5)
            assert len(inputs[field + 2]) >= SETTINGS.num_rows
            assert (np.abs(inputs[field + 2]).max(axis=0) <= inputs[field] * (1 + 1e-5)).all()


@pytest.mark.parametrize(("field", "value"), [("strengths", (0.5, 1.0)), ("num_tokens", 0), ("window", 0)])
def test_bad_settings(field, value):
    with pytest.raises(InputError, match=field):
        smoothing.Settings(**{field: value})


# -- From a directory, and what is kept -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("smoothed")
    write_checkpoint(directory, KERNEL_CONFIG.to_hf_dict(), salt="kernels")
    small_model.write_byte_tokenizer(directory / "tokenizer.json")
    return directory


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "text.txt"
    path.write_text("나는 오늘 학교에 갔다.\n\n이 영화는 정말 재미있다!\n" * 20, encoding="utf-8")
    return path


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product whose strength is searched from now on."""
    calls: list[int] = []
    search = smoothing.search

    def watched(*arguments):
        calls.append(1)
        return search(*arguments)

    monkeypatch.setattr(smoothing, "search", watched)
    return calls


def load(directory: pathlib.Path, text: pathlib.Path | None, **options) -> KoGPT:
    return KoGPT.from_pretrained(directory, quant="w8a8", calibration=text, **{"dtype": "fp32", **options})


def test_an_entry_is_read_back_bit_for_bit(directory, text, cache, searches):
    first = load(directory, text)
    assert len(searches) == 2 * PLAIN.num_layers
    second = load(directory, text)
    assert len(searches) == 2 * PLAIN.num_layers
    for leaf, same in zip(first.leaves, second.leaves, strict=True):
        np.testing.assert_array_equal(leaf, same)
    third = load(directory, text, keep_quantized=False)
    assert len(searches) == 4 * PLAIN.num_layers
    for leaf, same in zip(first.leaves, third.leaves, strict=True):
        np.testing.assert_array_equal(leaf, same)
    leaves = by_path(first.config, first.leaves)
    assert leaves["blocks.1.w_out_multiplier"].dtype == np.float32
    assert any((leaves[f"blocks.{layer}.w_out_multiplier"] != 1).any() for layer in range(PLAIN.num_layers))
    tokens = prompt(50)
    expected = KoGPT.from_pretrained(directory, dtype="fp32").logits(tokens)
    assert 1e-4 < error(first.logits(tokens), expected) < 0.1


def test_what_made_an_entry_is_on_record(directory, text, cache):
    load(directory, text)
    (entry,) = cache.iterdir()
    record = json.loads((entry / "smoothing.json").read_text())
    assert record["made_of"] == json.loads((entry / "config.json").read_text())["quantization_config"]
    assert record["made_of"]["scheme"] == "w8a8-smoothed"
    assert record["made_of"]["calibration"]["bytes"] == text.stat().st_size
    assert record["calibration_file"] == "text.txt"
    assert set(record["versions"]) == {"kogpt_jax", "jax"}
    assert len(record["layers"]) == PLAIN.num_layers
    assert quantized_cache.smoothing_of(entry)[1]["w_out"].keys() == {"strength", "error", "error_without"}
    tensors = test_checkpoint.stored(entry)
    assert tensors["transformer.h.1.mlp.fc_out.input_multiplier"].shape == (FFN,)
    with pytest.raises(InputError, match="quantization_config is not supported"):
        KoGPT.from_pretrained(entry)


def test_another_text_or_none_is_another_model(directory, text, cache, searches, tmp_path):
    smoothed = load(directory, text)
    plain = load(directory, None)
    assert not plain.config.has_multiplier
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes() + b".\n")
    load(directory, other)
    load(directory, text, dtype="bf16")
    assert len(searches) == 6 * PLAIN.num_layers
    assert len(list(cache.iterdir())) == 4
    assert not np.array_equal(smoothed.logits(prompt(9)), plain.logits(prompt(9)))


@pytest.mark.parametrize("damage", ["shorter", "no weights", "no report", "other config"])
def test_a_damaged_entry_is_made_anew(directory, text, cache, searches, damage):
    expected = load(directory, text).leaves
    (entry,) = cache.iterdir()
    weights = entry / "model.safetensors"
    if damage == "shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no report":
        (entry / "smoothing.json").unlink()
    else:
        (entry / "config.json").write_text("{}")
    for _ in range(2):  # the second finds it whole again
        for leaf, same in zip(load(directory, text).leaves, expected, strict=True):
            np.testing.assert_array_equal(leaf, same)
        assert len(searches) == 4 * PLAIN.num_layers


@pytest.mark.slow
def test_any_mesh_has_the_same_values(directory, text, tmp_path):
    """Made by a process with two tensor shards, read on one device; and what the shards hold, put together again."""
    script = """
        import dataclasses, pathlib, sys
        from kogpt_jax import checkpoint, quantized_cache, smoothing
        from kogpt_jax.sharding import Split, make_mesh
        from kogpt_jax.tokenizer import find_tokenizer, load_tokenizer

        source, text, out = map(pathlib.Path, sys.argv[1:])
        quantized_cache.directory = lambda: out / "quantized"
        config = dataclasses.replace(checkpoint.load_config(source), quant="w8a8", has_multiplier=True)
        calibration = smoothing.read_calibration(text, load_tokenizer(find_tokenizer(source)))
        leaves = quantized_cache.load_leaves(source, config, make_mesh(tensor=2), calibration=calibration)
        (out / "again").mkdir()
        checkpoint.write_leaves(out / "again", config, leaves, Split(1, 2))
    """
    run_script(script, directory, text, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    (entry,) = (tmp_path / "quantized").iterdir()
    kept, again = test_checkpoint.stored(entry), test_checkpoint.stored(tmp_path / "again")
    assert kept.keys() == again.keys()
    for key, tensor in kept.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)
    engine = load(directory, text, dtype=checkpoint.stored_dtype(directory))
    assert len(list((tmp_path / "quantized").iterdir())) == 1
    multiplier = by_path(engine.config, engine.leaves)["blocks.1.w_out_multiplier"]
    np.testing.assert_array_equal(multiplier[0, 0, DIM:], kept["transformer.h.1.mlp.fc_out.input_multiplier"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"", "holds no text"), (b" \n", "holds no text"), (b"ab\xff", "not UTF-8: .* byte 2")],
)
def test_bad_calibration_texts(directory, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"calibration .*bad.txt.*{message}"):
        load(directory, path)


def test_calibration_is_for_w8a8_and_takes_a_tokenizer(directory, text, tmp_path):
    for quant in ("none", "w8a16"):
        with pytest.raises(InputError, match=f"calibration .*text.txt is for quant w8a8, got quant {quant}"):
            KoGPT.from_pretrained(directory, quant=quant, calibration=text)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(InputError, match=r"calibration .*text.txt needs a tokenizer"):
        load(bare, text)


@pytest.mark.slow
def test_the_cache_of_a_run_does_not_change_what_is_smoothed(tmp_path, monkeypatch):
    """An entry serves models with a 16-bit and an INT8 cache: it is calibrated as one that has no INT8."""
    text = tmp_path / "text.txt"
    text.write_text("정말 재미있는 영화였다\n배우들의 연기가 좋다\n", encoding="utf-8")
    load = functools.partial(KoGPT.from_pretrained, "demo", dtype="fp32", quant="w8a8", calibration=text)
    leaves = [load(kv_dtype=kv_dtype, keep_quantized=False).leaves for kv_dtype in (None, "int8")]
    for leaf, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_a_calibration_text_without_a_token_is_refused(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("정말\n", encoding="utf-8")
    tokenizer = KoGPT.from_pretrained("demo", dtype="fp32").tokenizer
    calibration = smoothing.read_calibration(text, tokenizer)
    monkeypatch.setattr(smoothing, "line_documents", lambda text, tokenizer: [[]])
    with pytest.raises(InputError, match="holds no token"):
        smoothing.text_windows(calibration, 512)
