"""Which implementation runs each op: resolved once, by name, and what each name changes."""

import dataclasses
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import tolerances
from small_model import KERNEL_CONFIG, greedy, prompt

from custom_ops import MAX_ROWS, _library, make_semaphores, pages, quantize_weight
from kogpt_jax import KoGPT, decoding, kv_cache, ops
from kogpt_jax.config import Dtype, ModelConfig, OpsConfig
from kogpt_jax.decoding import DecodeState
from kogpt_jax.errors import InputError
from kogpt_jax.model import decode_linear, model_def, prefill_linear, random_leaves
from kogpt_jax.ops import describe, layer_products, resolve_ops
from kogpt_jax.packing import pack, stack
from kogpt_jax.sampling import RowSampling, SamplingParams
from kogpt_jax.sharding import make_mesh

QUANTIZED = dataclasses.replace(KERNEL_CONFIG, quant="w8a16")
W8A8 = dataclasses.replace(KERNEL_CONFIG, quant="w8a8")
REFERENCE = OpsConfig()
KERNELS = OpsConfig(
    linear="ffi", linear_many_rows="ffi", decode_attention="ffi", decode_layers="ffi", decode_steps="ffi"
)
ON_GPU = dataclasses.replace(KERNELS, prefill_attention="ffi")


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with both libraries and what fits the model: only the choice counts."""
    for op in ("linear", "decode_attention", "prefill_attention", "int8_gemm", "mixed_gemm"):
        monkeypatch.setattr(ops, f"{op}_ffi_problem", lambda **_: None)
    monkeypatch.setattr(ops, "library_info", lambda: (_library.LibraryInfo("host", instruction_set="avx2"),))


@pytest.mark.usefixtures("all_there")
@pytest.mark.parametrize(
    ("config", "platform", "expected"),
    [
        (
            KERNEL_CONFIG,
            "cpu",
            dataclasses.replace(KERNELS, linear_many_rows="reference", linear_prefill_tokens=32),
        ),
        (QUANTIZED, "cpu", KERNELS),
        (KERNEL_CONFIG, "gpu", dataclasses.replace(ON_GPU, linear_many_rows="reference")),
        (QUANTIZED, "gpu", dataclasses.replace(ON_GPU, linear_prefill_tokens=128, gemm="ffi")),
        (W8A8, "cpu", KERNELS),
        (W8A8, "gpu", dataclasses.replace(ON_GPU, linear_prefill_tokens=64, gemm="ffi")),
    ],
    ids=["cpu", "cpu w8a16", "gpu", "gpu w8a16", "cpu w8a8", "gpu w8a8"],
)
def test_auto_is_the_faster_one(config, platform, expected):
    assert resolve_ops(config, "auto", platform=platform) == expected
    assert resolve_ops(config, "reference", platform=platform) == REFERENCE
    assert resolve_ops(config, "ffi", platform=platform) == dataclasses.replace(expected, linear_many_rows="ffi")


@pytest.mark.usefixtures("all_there")
def test_auto_leaves_a_cpu_that_kernels_are_not_written_for_to_xla(monkeypatch):
    """But for INT8 weights, and where deterministic takes kernels."""
    for instruction_set in (None, "portable"):
        host = _library.LibraryInfo("host", instruction_set=instruction_set)
        monkeypatch.setattr(ops, "library_info", lambda host=host: (host,))
        assert resolve_ops(KERNEL_CONFIG, "auto", platform="cpu") == REFERENCE
        assert resolve_ops(QUANTIZED, "auto", platform="cpu") == KERNELS
        deterministic = resolve_ops(KERNEL_CONFIG, "auto", platform="cpu", deterministic=True)
        assert (deterministic.linear, deterministic.linear_prefill_tokens) == ("ffi", 0)


def test_auto_leaves_prompts_of_too_many_rows_to_xla(monkeypatch):
    monkeypatch.setattr(_library, "load", lambda platform: _library.LibraryInfo("cuda", problem=None))
    config = dataclasses.replace(KERNEL_CONFIG, dtype="bf16")
    assert resolve_ops(config, "auto", platform="gpu", max_rows=1024).prefill_attention == "ffi"
    assert resolve_ops(config, "auto", platform="gpu", max_rows=2048).prefill_attention == "reference"
    with pytest.raises(InputError, match="prefill_attention: there must be at most 1024 rows, got 2048"):
        resolve_ops(config, "ffi", platform="gpu", max_rows=2048)


def test_auto_goes_op_by_op(monkeypatch):
    monkeypatch.setattr(ops, "linear_ffi_problem", lambda **_: None)
    monkeypatch.setattr(ops, "decode_attention_ffi_problem", lambda **_: "head_dim must be 64")
    found = resolve_ops(QUANTIZED, "auto", platform="gpu")
    assert found == dataclasses.replace(REFERENCE, linear="ffi", linear_many_rows="ffi", linear_prefill_tokens=128)
    assert describe(found) == (
        "linear ffi (more than 64 rows ffi), decode_attention reference, prefill_attention reference, "
        "prompts of up to 128 tokens by linear, INT8 products of prefill and scoring reference"
    )
    with pytest.raises(InputError) as caught:
        resolve_ops(QUANTIZED, "ffi", platform="gpu")
    assert str(caught.value) == "implementation 'ffi' cannot be used for decode_attention: head_dim must be 64"


@pytest.mark.usefixtures("all_there")
@pytest.mark.parametrize("choice", ["auto", "ffi"])
def test_greedy_steps_that_are_not_one_call_are_told(caplog, choice):
    """Of a step's layers it changes nothing. Over stages there are no such steps, and nothing to tell."""
    many = dataclasses.replace(QUANTIZED, eos_token_ids=tuple(range(17)))
    found = resolve_ops(many, choice, platform="cpu")
    assert found == dataclasses.replace(KERNELS, decode_steps="reference")
    assert "decode_attention ffi (a step's layers as one call), " in describe(found)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "greedy steps are not one call: eos_token_ids must be at most 16, got 17")
    ]
    caplog.clear()
    most = dataclasses.replace(many, eos_token_ids=tuple(range(16)))
    assert resolve_ops(most, choice, platform="cpu") == KERNELS
    assert "decode_attention ffi (a step's layers as one call, greedy steps too), " in describe(KERNELS)
    assert resolve_ops(many, choice, platform="cpu", num_stages=2).decode_steps == "reference"
    assert resolve_ops(most, choice, platform="cpu", num_stages=2) == found
    assert not caplog.records


def test_an_int8_cache_has_kernels_on_gpus(monkeypatch):
    """Where there is a CUDA library: the same choices as for a 16-bit cache."""
    monkeypatch.setattr(_library, "load", lambda platform: _library.LibraryInfo("cuda", problem=None))
    for config in (KERNEL_CONFIG, QUANTIZED, W8A8):
        config = dataclasses.replace(config, dtype="bf16")
        int8 = dataclasses.replace(config, kv_dtype="int8")
        for choice in ("auto", "ffi"):
            found = resolve_ops(int8, choice, platform="gpu")
            assert found == resolve_ops(config, choice, platform="gpu")
            assert found.decode_attention == "ffi"
        assert found.prefill_attention == "ffi"


@pytest.mark.host
@pytest.mark.parametrize(
    ("config", "named"),
    [
        (dataclasses.replace(KERNEL_CONFIG, ffn_dim=84), ["linear", "K", "212"]),
        (dataclasses.replace(QUANTIZED, ffn_dim=200), ["linear", "K", "328", "16"]),
        (dataclasses.replace(KERNEL_CONFIG, num_heads=4), ["decode_attention", "head_dim", "32"]),
    ],
    ids=["K", "K of INT8", "head_dim"],
)
def test_kernels_that_do_not_fit_the_model_are_refused_by_name(config, named):
    with pytest.raises(InputError, match="implementation 'ffi' cannot be used for") as caught:
        KoGPT.from_random(config, implementation="ffi")
    assert all(name in str(caught.value) for name in named)
    assert "\n" not in str(caught.value)
    assert getattr(resolve_ops(config, "auto", platform="cpu"), named[0]) == "reference"


PREFILL_OPS = pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        ("none", dataclasses.replace(KERNELS, linear_prefill_tokens=150)),
        ("w8a16", dataclasses.replace(KERNELS, linear_prefill_tokens=150)),
        ("w8a16", OpsConfig(gemm="linear")),
    ],
    ids=["few tokens", "few tokens, w8a16", "any number, w8a16"],
)


@pytest.mark.host
def test_prompts_products_in_w8a8_by_linear_round_as_decode_steps_do():
    """As the calls say: no kernel for CPUs rounds, and so a Host result is that of w8a16."""
    x, weight = jnp.ones((64, W8A8.model_dim)), quantize_weight(jnp.ones((32, W8A8.model_dim)))
    chosen = dataclasses.replace(KERNELS, linear_prefill_tokens=64)
    for rows, target in ((64, "kogpt_linear"), (65, None)):
        call = jax.make_jaxpr(lambda x: prefill_linear(x, weight, W8A8, chosen))(jnp.ones((rows, x.shape[1])))
        (equation,) = [eqn for eqn in call.eqns if eqn.primitive.name == "ffi_call"] or [None]
        assert (equation and equation.params["target_name"]) == target
        assert equation is None or dict(equation.params["attributes"])["int8_activations"]


@pytest.mark.host
@PREFILL_OPS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_prompts_products_by_linear_are_those_of_xla(dtype, quant, chosen):
    """Both products of a layer, of fewer rows than a group and of more."""
    config = dataclasses.replace(KERNEL_CONFIG, dtype=dtype, quant=quant)
    (_, dim), (_, act_dim) = layer_products(config)
    rng = np.random.default_rng(0)

    def values(*shape: int, mean: float = 0.0, dtype: Any = config.jax_dtype) -> jax.Array:
        return jnp.asarray(rng.normal(mean, 1 if mean == 0 else 0.1, shape), dtype)

    layer_norm = (values(dim, mean=1), values(dim), 1e-5)
    k_multiplier = values(act_dim, mean=1, dtype=jnp.float32)
    weights = [values(*shape, dtype=jnp.float32) / 12 for shape in layer_products(config)]
    w_in, w_out = (
        weight.astype(config.jax_dtype) if quant == "none" else quantize_weight(weight) for weight in weights
    )
    bias = values(dim + config.ffn_dim)
    for rows in (3, 150, 300):
        x, act = values(rows, dim, dtype=jnp.float32), values(rows, act_dim)
        gelu = {"layer_norm": layer_norm, "bias": bias[dim:], "gelu_from": 3 * dim, "act_dim": act_dim}
        calls: list[tuple[jax.Array, Any, dict[str, Any]]] = [
            (x, w_in, gelu),
            (act, w_out, {"bias": bias[:dim], "residual": x}),
            (act, w_out, {"out_dtype": jnp.float32, "k_multiplier": k_multiplier}),
        ]
        for value, weight, options in calls:

            def run(value: jax.Array, weight: Any, chosen: OpsConfig = chosen, options: Any = options) -> Any:
                return prefill_linear(value, weight, config, chosen, **options)

            is_by_linear = chosen.gemm == "linear" or rows <= 150
            assert ("target_name=kogpt_linear" in str(jax.make_jaxpr(run)(value, weight))) == is_by_linear
            y, gelus = run(value, weight)
            expected_y, expected_gelus = run(value, weight, REFERENCE)
            tolerances.assert_close(y, expected_y, tolerances.MODULE[dtype], "y")
            assert y.dtype == expected_y.dtype
            assert (gelus is None) == (expected_gelus is None) == ("gelu_from" not in options)
            if gelus is not None and expected_gelus is not None:
                assert gelus.shape == expected_gelus.shape
                got, expected = (part[:, dim:] for part in (gelus, expected_gelus))
                tolerances.assert_close(got, expected, tolerances.MODULE[dtype], "act")


def lowered(batch: int, chosen: OpsConfig, config: ModelConfig = KERNEL_CONFIG) -> str:
    """The decode loop before XLA has it: no library is needed for that."""
    mesh = make_mesh()
    definition = model_def(config, ops=chosen)
    leaves = [jax.ShapeDtypeStruct(param.shape, param.dtype) for param in definition.params]
    cache = kv_cache.make_kv_cache(config, mesh, batch, 64)
    rows = RowSampling.from_params([SamplingParams(seed=0)] * batch)
    ones = jnp.ones(batch, jnp.int32)
    state = DecodeState(cache, ones, ones, jnp.zeros(batch, bool), rows, make_semaphores(), None)
    static = {"definition": definition, "mesh": mesh, "num_steps": 8}
    return decoding.decode_loop.lower(leaves, state, **static).as_text()


@pytest.mark.parametrize("field", ["linear", "linear_many_rows", "decode_attention"])
def test_every_field_of_a_step_matters(field):
    chosen = dataclasses.replace(REFERENCE, **{field: "ffi"})  # type: ignore[arg-type]
    batch = MAX_ROWS + 1 if field == "linear_many_rows" else 2
    text = lowered(batch, chosen)
    num_linear, num_attention = (text.count(f"@{name}") for name in ("kogpt_linear", "kogpt_decode_attention"))
    products = 2 * KERNEL_CONFIG.num_layers + 1
    expected = {
        "linear": (products, 0),
        "linear_many_rows": (2 * products, 0),  # groups of 64 and 1
        "decode_attention": (0, KERNEL_CONFIG.num_layers),
    }
    assert (num_linear, num_attention) == expected[field]
    assert "custom_call @kogpt" not in lowered(batch, REFERENCE)


@pytest.mark.host
def test_what_is_one_call_is_told_by_the_ops():
    """Greedy steps; the layers of one, with their head; or op by op. Not beyond 64 rows."""
    layers = dataclasses.replace(KERNELS, decode_steps="reference")
    ops_alone = dataclasses.replace(layers, decode_layers="reference")
    for chosen, target in ((KERNELS, "decode_steps"), (layers, "decode_layers"), (ops_alone, "decode_attention")):
        found = set(re.findall(r"@kogpt_(\w+)", lowered(2, chosen)))
        assert found == ({target, "linear"} if target == "decode_attention" else {target})
    assert "@kogpt_decode_steps" in lowered(MAX_ROWS, KERNELS)
    assert "@kogpt_decode_steps" not in lowered(MAX_ROWS + 1, KERNELS)


@pytest.mark.host
def test_w8a8_lets_steps_round_the_inputs_of_the_layers_products():
    """Not that of lm_head, and w8a16 none."""
    layers = dataclasses.replace(KERNELS, decode_steps="reference")
    ops_alone = dataclasses.replace(layers, decode_layers="reference")
    for config, permits in ((W8A8, True), (QUANTIZED, False), (KERNEL_CONFIG, False)):
        for chosen in (KERNELS, layers, ops_alone):
            found = re.findall(r"int8_activations = (\w+)", lowered(2, chosen, config))
            expected = [str(permits).lower()] * (2 * config.num_layers if chosen == ops_alone else 1)
            assert found == (expected + ["false"] if chosen == ops_alone else expected)


@pytest.mark.host
def test_over_stages_steps_are_no_call_of_their_own():
    """An engine knows that, and gives the same texts."""
    one, two = (KoGPT.from_random(KERNEL_CONFIG, implementation="ffi", mesh=mesh) for mesh in ("d1p1t1", "d1p2t1"))
    tokens = ops.linear_prefill_tokens(KERNEL_CONFIG, platform="cpu")
    assert one.ops == dataclasses.replace(KERNELS, linear_prefill_tokens=tokens)
    assert two.ops == dataclasses.replace(one.ops, decode_steps="reference")
    texts = [engine.generate_ids([prompt(9)], greedy(12))[0].token_ids for engine in (one, two)]
    assert texts[0] == texts[1]


def test_prefill_through_its_op_is_the_same(monkeypatch):
    """With the op's reference in place of its kernel, which may make NaN of what stands behind a prompt."""
    op = sys.modules["custom_ops.prefill_attention"]
    calls = []

    def run(qkv, rotary, k_pages, v_pages, page_table, begins, num_new, lengths, act, **options):
        calls.append(options)
        act, *pages = op.prefill_attention_reference(
            qkv, rotary, k_pages, v_pages, page_table, begins, num_new, lengths, act, **options
        )
        index = jnp.arange(act.shape[0]) - begins[:, None]
        is_token = jnp.any((index >= 0) & (index < num_new[:, None]), axis=0)
        return jnp.where(is_token[:, None], act, jnp.nan), *pages

    monkeypatch.setattr(op, "prefill_attention_ffi", run)
    config, mesh = KERNEL_CONFIG, make_mesh()
    leaves = random_leaves(config, mesh)
    lengths = np.array([70, 1, 128, 33], np.int32)
    batch = lengths.size
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, 128)).astype(np.int32)
    chunks = stack(pack([row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]))

    def prefill(chosen: OpsConfig):
        cache = kv_cache.make_kv_cache(config, mesh, batch, 192)
        static = {"definition": model_def(config, ops=chosen), "mesh": mesh}
        return decoding.prefill(leaves, cache, jnp.zeros((batch, config.model_dim)), chunks, **static)

    expected_cache, expected = prefill(REFERENCE)
    assert not calls
    cache, last_hidden = prefill(dataclasses.replace(REFERENCE, prefill_attention="ffi"))
    assert calls == [{"max_new": 128}] * config.num_layers
    tolerances.assert_close(last_hidden, expected, tolerances.CACHED_VS_WHOLE["fp32"], "hidden")
    np.testing.assert_array_equal(cache.lengths, expected_cache.lengths)
    is_valid = pages.valid_tokens(jnp.asarray(lengths), 3, kv_cache.PAGE_LEN)
    for got, wanted in zip(cache.k + cache.v, expected_cache.k + expected_cache.v, strict=True):
        got_tokens, wanted_tokens = (
            np.asarray(pages.gather(pool, cache.page_table)).swapaxes(2, 3)[is_valid] for pool in (got, wanted)
        )
        tolerances.assert_close(got_tokens, wanted_tokens, tolerances.CACHED_VS_WHOLE["fp32"], "cache")


@pytest.mark.host
@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1, 150])
def test_a_row_has_the_same_bits_in_any_number_of_rows(rows):
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(rng.normal(size=(150, width)), jnp.float32) for width in (64, 96))
    weight, bias = jnp.asarray(rng.normal(size=(96, 64)), jnp.float32), jnp.asarray(rng.normal(size=96), jnp.float32)

    @jax.jit
    def call(x, residual):
        return decode_linear(x, weight, KERNELS, make_semaphores(), bias=bias, residual=residual)[0]

    alone = np.concatenate([call(x[row : row + 1], residual[row : row + 1]) for row in range(rows)])
    np.testing.assert_array_equal(call(x[:rows], residual[:rows]), alone)


@pytest.mark.host
@pytest.mark.parametrize("quant", ["none", "w8a16", "w8a8"])
def test_a_row_of_a_step_has_the_same_bits_in_any_batch(quant):
    """A whole decode step by the kernels over the same pages: alone, among some, among all."""
    dtype: Dtype = "fp32" if jax.default_backend() == "cpu" else "bf16"
    config, mesh, batch = dataclasses.replace(KERNEL_CONFIG, dtype=dtype, quant=quant), make_mesh(), 17
    engine = KoGPT.from_random(config, implementation="ffi")
    state, _ = engine._prefill(engine._requests([prompt(1 + 7 * row, row) for row in range(batch)], greedy(8)))

    @jax.jit
    def logits(leaves, cache, tokens):
        def local(leaves, cache, tokens):
            model = engine._definition.merge(leaves)
            x, _, semaphores = model.decode_step(model.embed(tokens), jnp.ones_like(tokens), cache, make_semaphores())
            return model.next_logits(x, semaphores)[0]

        specs = decoding._state_specs(engine._definition, state.sampling)
        in_specs = (engine._definition.leaf_specs(), specs.cache, specs.tokens)
        shard_map = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=specs.tokens, check_vma=False)
        return shard_map(leaves, cache, tokens)

    def of_rows(chosen: slice) -> np.ndarray:
        part = dataclasses.replace(
            state.cache, page_table=state.cache.page_table[chosen], lengths=state.cache.lengths[chosen]
        )
        return np.asarray(logits(list(engine.leaves), part, state.tokens[chosen]))

    together = of_rows(slice(None))
    assert np.isfinite(together).all()
    for chosen in (slice(0, 1), slice(8, 9), slice(16, 17), slice(3, 6), slice(5, 15)):
        np.testing.assert_array_equal(of_rows(chosen), together[chosen])


@pytest.mark.slow
@pytest.mark.host
def test_more_rows_than_a_call_takes(tmp_path):
    """A batch of 128 through groups of 64 is the same texts as one after the other."""
    engine = KoGPT.from_random(KERNEL_CONFIG, implementation="ffi", max_batch_size=128)
    prompts = [prompt(1 + row % 16, row) for row in range(70)]
    together = engine.generate_ids(prompts, greedy(6))
    small = KoGPT(engine.config, engine.leaves, engine.mesh, implementation="reference", max_batch_size=8)
    for completion, expected in zip(together, small.generate_ids(prompts, greedy(6)), strict=True):
        assert completion.token_ids == expected.token_ids


def test_an_unknown_choice_is_refused():
    with small_model.unchecked_types(), pytest.raises(InputError, match="implementation must be one of .*, got 'fast'"):
        resolve_ops(KERNEL_CONFIG, "fast", platform="cpu")  # type: ignore[arg-type]
