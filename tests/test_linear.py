"""`custom_ops.linear`: the reference against sums in f64, the kernels against the reference's own error, and what must
not depend on anything. test_linear_on_gpu.py runs the same functions on a GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
import tolerances
from hlo import Module, num_elements
from jax.sharding import PartitionSpec
from op_cases import LinearCase, call_linear, case_id, linear_arguments, linear_oracle

import custom_ops
from custom_ops import EarlyColumns, QuantizedArray, make_semaphores, numerics

CASES = [case for case in op_cases.read_cases("linear") if case.dtype != "fp32"]
FP32_CASES = [case for case in op_cases.read_cases("linear") if case.dtype == "fp32"]
LAYER_CASES = [
    LinearCase(outputs=300, k=1040, dtype="bf16", weight="int8", ln=1, bias=1, gelu_from=100, act_dim=260, y="bf16"),
    LinearCase(outputs=130, k=2048, dtype="fp16", bias=1, residual=1),
    LinearCase(outputs=99, k=528, dtype="bf16", weight="int8", k_multiplier=1),
    LinearCase(outputs=516, k=328, dtype="bf16", ln=1),
    LinearCase(outputs=2304, k=1032, dtype="bf16", bias=1, residual=1),
    LinearCase(outputs=2304, k=1040, dtype="fp16", weight="int8", residual=1),
]
LAYER_CASES += [
    dataclasses.replace(case, int8_activations=1) for case in LAYER_CASES if case.weight == "int8"
]  # on CPUs the same

with_library = pytest.mark.host


def jitted(case: LinearCase, implementation: str = "ffi", **options):
    """(arguments, semaphores) -> y, GELU's outputs without what stands before them (None if there are none),
    semaphores."""

    def call(arguments, semaphores):
        y, *act, semaphores = call_linear(
            case, arguments, semaphores=semaphores, implementation=implementation, **options
        )
        return y, act[0][:, act[0].shape[1] - case.num_gelu :] if act else None, semaphores

    return jax.jit(call)


def outputs(case: LinearCase, y, gelu):
    """The results that a case has, with name and dtype."""
    if case.gelu_from != 0:
        yield "y", y, "fp32" if case.y == "f32" else case.y
    if case.num_gelu:
        yield "act", gelu, case.dtype


def poison(arguments):
    """Arguments of the same shapes that make every result NaN; integers stay."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments)


def check_errors(case: LinearCase) -> None:
    arguments = linear_arguments(case)
    oracle = dict(zip(("y", "act"), linear_oracle(case, arguments), strict=True))
    reference = jitted(case, "reference")(arguments, None)[:2]
    errors = {name: tolerances.relative_error(value, oracle[name]) for name, value, _ in outputs(case, *reference)}
    run = jitted(case)
    tensor_core_k = 0
    if jax.default_backend() == "gpu":
        tensor_core_k = case.k
        if case.weight == "int8":
            rounded = dict(zip(("y", "act"), linear_oracle(case, arguments, has_integers=True), strict=True))
            for name in errors:
                errors[name] = max(errors[name], tolerances.relative_error(rounded[name], oracle[name]))
    for name in op_cases.instruction_sets():
        op_cases.limit_instruction_set(name)
        # What is not written holds NaN, or what another call has left.
        run(poison(arguments), make_semaphores())
        y, gelu, semaphores = run(arguments, make_semaphores())
        for output, value, dtype in outputs(case, y, gelu):
            rule = tolerances.twice_the_references_error(errors[output], dtype, tensor_core_k=tensor_core_k)
            tolerances.assert_close(value, oracle[output], rule, f"{output} on {name}")
        assert y.dtype == op_cases.DTYPES[case.y]
        assert not np.any(semaphores)


@pytest.mark.parametrize("case", CASES + FP32_CASES, ids=case_id)
def test_reference_against_f64(case):
    arguments = linear_arguments(case)
    results = jitted(case, "reference")(arguments, None)[:2]
    oracle = dict(zip(("y", "act"), linear_oracle(case, arguments), strict=True))
    for name, value, _ in outputs(case, *results):
        tolerances.assert_close(value, oracle[name], tolerances.MODULE[case.dtype], name)


def test_reference_takes_more_rows_and_zeros_what_is_attentions():
    case = LinearCase(rows=70, outputs=9, k=5, dtype="fp32", gelu_from=4, act_dim=8)
    y, act, semaphores = call_linear(case, linear_arguments(case), implementation="reference")
    assert y.shape == (70, 4)
    assert act.shape == (70, 8)
    assert not np.any(act[:, :3])
    assert np.all(np.any(act[:, 3:], axis=1))
    assert semaphores is None


@with_library
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_at_most_twice_the_references(case):
    check_errors(case)


@with_library
@pytest.mark.parametrize("case", FP32_CASES, ids=case_id)
def test_error_in_f32_is_at_most_twice_the_references(case):
    check_errors(case)


@with_library
@pytest.mark.parametrize("case", LAYER_CASES, ids=case_id)
def test_a_row_is_the_same_bits_in_every_batch(case):
    """Alone, and at two places in batches of 1 to 64 rows with other neighbours; and each call twice."""
    whole = dataclasses.replace(case, rows=64)
    arguments = linear_arguments(whole)
    rng = np.random.default_rng(5)
    for name in op_cases.instruction_sets():
        op_cases.limit_instruction_set(name)
        expected = jax.tree.map(np.asarray, jitted(whole)(arguments, make_semaphores())[:2])
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64):
            run = jitted(dataclasses.replace(case, rows=rows))
            for _ in range(2):
                chosen = np.sort(rng.permutation(64)[:rows])[::-1]
                part = op_cases.rows_of(arguments, chosen)
                once, again = (run(part, make_semaphores())[:2] for _ in range(2))
                for row_results in (once, again):
                    jax.tree.map(
                        lambda got, all_rows, chosen=chosen: np.testing.assert_array_equal(
                            np.asarray(got), all_rows[chosen]
                        ),
                        row_results,
                        expected,
                    )


@with_library
def test_each_row_alone_is_the_same_bits():
    case = LAYER_CASES[0]
    whole = dataclasses.replace(case, rows=64)
    arguments = linear_arguments(whole)
    expected = jax.tree.map(np.asarray, jitted(whole)(arguments, make_semaphores())[:2])
    run = jitted(case)
    for row in range(64):
        alone = run(op_cases.rows_of(arguments, slice(row, row + 1)), make_semaphores())[:2]
        jax.tree.map(
            lambda got, all_rows, row=row: np.testing.assert_array_equal(got[0], all_rows[row]), alone, expected
        )


@with_library
def test_a_prefetched_weight_gives_the_same_bits():
    case = dataclasses.replace(LAYER_CASES[0], rows=3)
    arguments = linear_arguments(case)
    plain = jitted(case)(arguments, make_semaphores())[:2]
    prefetched = jitted(case, prefetch_weight=True)(arguments, make_semaphores())[:2]
    jax.tree.map(np.testing.assert_array_equal, plain, prefetched)


# Of a layer: model_dim, ffn_dim, rows. In the first its first product, too, is cut along K; others are the 6B model's.
EARLY_SHAPES = [(256, 520, 3), (512, 2048, 20)]
MANY_EARLY_SHAPES = [(512, 2048, 1), (512, 2048, 8), (512, 2048, 64)]
# With an INT8 weight: early columns that begin with a group that has a scale, and within one; as many rows as they are
# taken ahead for, and more. Each with 16-bit activations and with 8-bit ones.
INT8_EARLY_SHAPES = [(256, 528, 1), (448, 448, 1), (256, 528, 2), (512, 2048, 8), (448, 448, 40)]
MANY_INT8_EARLY_SHAPES = [(512, 2048, 1), (512, 2048, 2), (512, 2048, 40), (2304, 1024, 1)]
MANY_INT8_EARLY_SHAPES += [(4096, 16384, 1), (4096, 16384, 2), (4096, 16384, 8), (4096, 16384, 40)]
# Parts of K without early chunks or without late ones.
MANY_EARLY_SHAPES += [(448, 448, 3), (448, 448, 20)]
MANY_EARLY_SHAPES += [(2304, 1024, 3), (2304, 1024, 20), (4096, 16384, 1), (4096, 16384, 8), (4096, 16384, 64)]
NUM_LAYERS = 6


def early_arguments(model_dim: int, ffn_dim: int, rows: int, *, quant: bool) -> dict[str, Any]:
    """Of `early_layers`: weights of two layers in turn, and a cache of 70 tokens of 100."""
    rng = np.random.default_rng(6)

    def random(*shape, scale=1.0, dtype=BF16):
        return op_cases.heavy_tailed(rng, *shape, dtype=dtype, scale=scale)

    def weights(*shape):
        both = random(2, *shape, scale=shape[1] ** -0.5)
        return custom_ops.quantize_weight(both) if quant else both

    in_shape, out_shape = (3 * model_dim + ffn_dim, model_dim), (model_dim, model_dim + ffn_dim)
    pages = (2 * rows + 1, model_dim // 64, 64, 64)
    return {
        "x": random(rows, model_dim, dtype=F32),
        "w_in": weights(*in_shape),
        "w_out": weights(*out_shape),
        "bias": random(ffn_dim, scale=0.3),
        "ln_scale": 1 + random(model_dim, scale=0.1),
        "ln_bias": random(model_dim, scale=0.1),
        "k_pages": random(*pages),
        "v_pages": random(*pages),
        "page_table": jnp.arange(2 * rows, dtype=jnp.int32).reshape(rows, 2),
    }


def early_layers(
    arguments, implementation, *, mark_of, run=lambda function: function, int8_activations=False, largest_integer=None
):
    """Layers of two products and attention; each of these through ``run``. Returns the residual stream behind each, and
    the semaphores.

    ``largest_integer``: the products' inputs are rounded as the kernels for sm_90a do it beside INT8 weights.
    """
    rows, model_dim = arguments["x"].shape
    act_dim = arguments["w_out"].shape[2]
    norm = (arguments["ln_scale"], arguments["ln_bias"], op_cases.EPSILON)
    rotary = (jnp.ones((rows, 0)), jnp.ones((rows, 0)))
    lengths, num_new = jnp.full(rows, 70, jnp.int32), jnp.ones(rows, jnp.int32)
    x, k_pages, v_pages = arguments["x"], arguments["k_pages"], arguments["v_pages"]
    semaphores = make_semaphores() if implementation == "ffi" else None
    streams = []

    def rounded(h, group_len):
        integers = op_cases.as_integers(np.asarray(h, np.float64), largest_integer, group_len=group_len)
        return jnp.asarray(integers, h.dtype)

    for layer in range(NUM_LAYERS):
        mark = mark_of(layer)

        def w_in(x, weight, semaphores, mark=mark):
            layer_norm: Any = norm
            if largest_integer is not None:
                x, layer_norm = rounded(numerics.layer_norm(x, *norm), x.shape[1]), None
            return custom_ops.linear(
                x,
                weight,
                layer_norm=layer_norm,
                bias=arguments["bias"],
                gelu_from=3 * model_dim,
                act_dim=act_dim,
                semaphores=semaphores,
                prefetch_weight=True,
                done_mark=mark,
                int8_activations=int8_activations,
                implementation=implementation,
            )

        def attention(qkv, k_pages, v_pages, act, semaphores, mark=mark):
            return custom_ops.decode_attention(
                qkv,
                rotary,
                k_pages,
                v_pages,
                arguments["page_table"],
                lengths,
                num_new,
                act,
                semaphores=semaphores,
                prefetch_cache=True,
                leaves_room=mark > 0,
                implementation=implementation,
            )

        def w_out(act, weight, x, semaphores, mark=mark):
            return custom_ops.linear(
                act if largest_integer is None else rounded(act, 256),
                weight,
                residual=x,
                semaphores=semaphores,
                prefetch_weight=True,
                early=EarlyColumns(model_dim, mark) if mark else None,
                int8_activations=int8_activations,
                implementation=implementation,
            )

        qkv, act, semaphores = run(w_in)(x, arguments["w_in"][layer % 2], semaphores)
        act, k_pages, v_pages, semaphores = run(attention)(qkv, k_pages, v_pages, act, semaphores)
        x, semaphores = run(w_out)(act, arguments["w_out"][layer % 2], x, semaphores)
        streams.append(x)
    return jnp.stack(streams), semaphores


def one_by_one(function):
    """Jitted, and waited for: whatever is awaited is there."""
    return lambda *arguments: jax.block_until_ready(jax.jit(function)(*arguments))


def check_early_columns(
    model_dim: int, ffn_dim: int, rows: int, *, quant: bool = False, int8_activations: bool = False
) -> None:
    arguments = early_arguments(model_dim, ffn_dim, rows, quant=quant)
    layers = functools.partial(early_layers, int8_activations=int8_activations)

    def mark_of(layer):
        return layer + 1

    together = jax.jit(lambda arguments: layers(arguments, "ffi", mark_of=mark_of))
    x, semaphores = together(arguments)
    assert not np.any(semaphores)
    apart, semaphores = layers(arguments, "ffi", mark_of=mark_of, run=one_by_one)
    assert not np.any(semaphores)
    for _ in range(5):
        np.testing.assert_array_equal(together(arguments)[0], apart)
    alone = {name: array[:1] if name in ("x", "page_table") else array for name, array in arguments.items()}
    np.testing.assert_array_equal(together(alone)[0][:, 0], apart[:, 0])
    # And the results are right: as near to f32's as those of the reference in the same precision, and as without marks.
    in_f32 = jax.tree.map(
        lambda array: array.astype(F32) if jnp.issubdtype(array.dtype, jnp.floating) else array, arguments
    )
    oracle = np.asarray(early_layers(in_f32, "reference", mark_of=mark_of)[0], np.float64)
    references = [early_layers(arguments, "reference", mark_of=mark_of)[0]]
    if quant and jax.default_backend() == "gpu":
        largest = 127 if int8_activations else 32639
        references.append(early_layers(in_f32, "reference", mark_of=mark_of, largest_integer=largest)[0])
    plain = jax.jit(lambda arguments: layers(arguments, "ffi", mark_of=lambda _: 0))(arguments)[0]
    for layer in range(NUM_LAYERS):
        error = max(tolerances.relative_error(reference[layer], oracle[layer]) for reference in references)
        rule = tolerances.twice_the_references_error(error, "bf16")
        for name, value in (("early", x), ("plain", plain)):
            tolerances.assert_close(value[layer], oracle[layer], rule, f"{name} columns, layer {layer}")


@with_library
@pytest.mark.parametrize("shape", EARLY_SHAPES, ids=str)
def test_early_columns_are_awaited(shape):
    """Layers in one program, where a product begins before attention has ended, give the bits of calls of which each
    has ended before the next."""
    check_early_columns(*shape)


@with_library
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("shape", INT8_EARLY_SHAPES, ids=str)
def test_early_columns_are_awaited_beside_int8_weights(shape, int8_activations):
    check_early_columns(*shape, quant=True, int8_activations=int8_activations)


@with_library
def test_semaphores_stay_in_place_and_order_the_calls():
    case = LinearCase(rows=2, outputs=64, k=64)
    arguments = linear_arguments(case)

    def twice(arguments, semaphores):
        first, semaphores = call_linear(case, arguments, semaphores=semaphores, implementation="ffi")
        second, semaphores = call_linear(case, arguments, semaphores=semaphores, implementation="ffi")
        return first + second, semaphores

    text = jax.jit(twice, donate_argnums=1).lower(arguments, make_semaphores()).compile().as_text()
    assert text is not None
    module = Module.parse(text)
    calls = [line for line in text.splitlines() if 'custom_call_target="kogpt_linear"' in line]
    assert len(calls) == 2
    assert all("output_to_operand_aliasing={{4}: (8, {})}" in line for line in calls)
    assert any(parameter.result.startswith("s32[65536]") for parameter in module.aliased_parameters())
    copied = [i for i in module.running() if i.opcode == "copy" and num_elements(i.result) >= 65536]
    assert not copied


@with_library
def test_inside_shard_map_nothing_is_gathered():
    """One device on a GPU machine of one; test_ops_on_cpu.py has two."""
    check_shard_map(jax.devices()[:1])


def check_shard_map(devices):
    """A weight that is sharded by its outputs: each device multiplies by its own rows."""
    mesh = jax.make_mesh((len(devices),), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    case = LinearCase(rows=3, outputs=128, k=64, dtype="bf16", weight="int8")
    arguments = linear_arguments(case)

    def local(x, weight):
        return custom_ops.linear(x, weight, semaphores=make_semaphores(), implementation="ffi")[0]

    by_output = PartitionSpec("tensor", None)
    run = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), by_output),
            out_specs=PartitionSpec(None, "tensor"),
            check_vma=False,
        )
    )
    weight = jax.device_put(arguments["weight"], jax.sharding.NamedSharding(mesh, by_output))
    text = run.lower(arguments["x"], weight).compile().as_text()
    assert text is not None
    assert "all-gather" not in text
    alone = jitted(case)(arguments, make_semaphores())[0]
    sharded = np.asarray(run(arguments["x"], weight)).astype(np.float32)
    np.testing.assert_array_equal(sharded, np.asarray(alone.astype(jnp.bfloat16), np.float32))


@with_library
def test_vmap_raises():
    case = LinearCase(rows=2, outputs=8, k=16)
    arguments = linear_arguments(case)
    x = jnp.stack([arguments["x"]] * 3)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda x: call_linear(case, arguments | {"x": x}, semaphores=make_semaphores(), implementation="ffi"))(
            x
        )


BASE = LinearCase(rows=4, outputs=24, k=32, dtype="bf16", ln=1, bias=1, gelu_from=8, act_dim=20, y="bf16")
F32, BF16, FP16 = jnp.float32, jnp.bfloat16, jnp.float16


@pytest.mark.parametrize("implementation", ["reference", pytest.param("ffi", marks=with_library)])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros(32, BF16)}, r"x must have 2 axes, got shape \(32,\)"),
        ({"x": jnp.zeros((4, 32), FP16)}, "x must be bfloat16 or float32, got float16"),
        ({"weight": jnp.zeros((24, 40), BF16)}, r"K = 32, got \(24, 40\)"),
        ({"weight": jnp.zeros((24, 32), jnp.int8)}, "weight must be float32 or float16 or bfloat16, got int8"),
        ({"bias": jnp.zeros(24, BF16)}, r"bias must have shape \(16,\), got \(24,\)"),
        ({"bias": jnp.zeros(16, F32)}, "bias must be bfloat16, got float32"),
        ({"ln_scale": jnp.zeros(31, BF16)}, r"layer_norm.scale must have shape \(32,\), got \(31,\)"),
        ({"ln_bias": jnp.zeros(32, F32)}, "layer_norm.bias must be bfloat16, got float32"),
        ({"k_multiplier": jnp.zeros(32, BF16)}, "k_multiplier must be float32, got bfloat16"),
        ({"residual": jnp.zeros((4, 24), F32)}, r"residual must have shape \(4, 8\), got \(4, 24\)"),
        ({"residual": jnp.zeros((4, 8), F32), "out_dtype": BF16}, "out_dtype must be float32, got bfloat16"),
        ({"out_dtype": FP16}, "out_dtype must be bfloat16 or float32, got float16"),
        ({"gelu_from": 24}, r"gelu_from must be in \[0, 24\)"),
        ({"gelu_from": -1}, r"gelu_from must be in \[0, 24\), the outputs of weight, got -1"),
        ({"act_dim": 15}, "act_dim must be at least 16, GELU's outputs, got 15"),
        ({"gelu_from": None, "bias": jnp.zeros(24, BF16)}, "act_dim must be None without gelu_from, got 20"),
        ({"done_mark": -1}, r"done_mark must be in \[0, 2147483647\], got -1"),
        ({"early": EarlyColumns(0, 1)}, "early needs an x that neither layer_norm nor k_multiplier changes"),
        ({"int8_activations": True}, "int8_activations needs an INT8 weight, got one of bfloat16"),
        ({"implementation": "auto"}, "implementation must be 'reference' or 'ffi', got 'auto'"),
        (
            {"weight": QuantizedArray(jnp.zeros((24, 32), jnp.int8), jnp.ones((24, 32)))},
            r"weight.scale must have shape \(24, 1\), got \(24, 32\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes, message, implementation):
    arguments = linear_arguments(BASE) | {name: value for name, value in changes.items() if name in ARRAYS}
    options = {"implementation": implementation, "semaphores": make_semaphores()}
    options |= {name: value for name, value in changes.items() if name not in ARRAYS}
    with pytest.raises(ValueError, match=message):
        call_linear(BASE, arguments, **options)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("ffi", marks=with_library)])
@pytest.mark.parametrize("early", [EarlyColumns(-1, 1), EarlyColumns(33, 1), EarlyColumns(8, 0)], ids=str)
def test_early_columns_beyond_x_or_without_a_mark_are_refused(early, implementation):
    case = LinearCase(rows=2, outputs=8, k=32)
    with pytest.raises(ValueError, match=r"early must begin in \[0, 32\] with a mark in \[1, 2147483647\], got"):
        call_linear(
            case, linear_arguments(case), early=early, semaphores=make_semaphores(), implementation=implementation
        )


@with_library
@pytest.mark.parametrize("case", [case for case in LAYER_CASES if case.int8_activations], ids=case_id)
def test_a_cpu_does_not_round_to_integers(case):
    arguments = linear_arguments(case)
    found = jitted(case)(arguments, make_semaphores())[:2]
    expected = jitted(dataclasses.replace(case, int8_activations=0))(arguments, make_semaphores())[:2]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


ARRAYS = ("x", "weight", "bias", "ln_scale", "ln_bias", "k_multiplier", "residual")


@with_library
@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (LinearCase(rows=65, outputs=8, k=16), {}, r"1 to 64 rows with implementation \"ffi\", got shape \(65, 16\)"),
        (LinearCase(rows=0, outputs=8, k=16), {}, r"1 to 64 rows with implementation \"ffi\", got shape \(0, 16\)"),
        (LinearCase(rows=1, outputs=8, k=20), {}, "K must be a multiple of 8 with bfloat16 weights, got 20"),
        (
            LinearCase(rows=1, outputs=8, k=24, weight="int8"),
            {},
            "K must be a multiple of 16 with int8 weights, got 24",
        ),
        (LinearCase(rows=1, outputs=8, k=16), {"semaphores": None}, "semaphores must be given"),
        (
            LinearCase(rows=1, outputs=8, k=16),
            {"semaphores": jnp.zeros(64, jnp.int32)},
            r"semaphores must have shape \(65536,\), got \(64,\)",
        ),
    ],
    ids=lambda value: case_id(value) if isinstance(value, LinearCase) else None,
)
def test_what_the_kernels_do_not_support_is_refused_by_name(case, options, message):
    with pytest.raises(ValueError, match=message):
        call_linear(case, linear_arguments(case), implementation="ffi", **({"semaphores": make_semaphores()} | options))


def test_a_quantised_weight_is_near_the_weight():
    weight = op_cases.heavy_tailed(np.random.default_rng(0), 19, 99, dtype=jnp.float32).at[3].set(0)
    quantized = custom_ops.quantize_weight(weight)
    assert quantized.qvalue.dtype == jnp.int8
    assert quantized.scale.shape == (19, 1)
    error = np.abs(np.asarray(custom_ops.dequantize(quantized)) - np.asarray(weight))
    assert np.all(error <= 0.5001 * np.asarray(quantized.scale))
    largest = np.abs(np.asarray(quantized.qvalue, np.int32)).max(axis=1)
    np.testing.assert_array_equal(np.delete(largest, 3), 127)
    assert np.all(np.asarray(custom_ops.dequantize(quantized))[3] == 0)


def test_a_scale_can_serve_a_stack_of_shards():
    """K of a row-parallel weight is split over shards; their parts of an output have one scale."""
    weight = op_cases.heavy_tailed(np.random.default_rng(1), 2, 6, 16, dtype=jnp.float32)
    quantized = custom_ops.quantize_weight(weight, contract_axes=(0, 2))
    assert quantized.scale.shape == (1, 6, 1)
    joined = custom_ops.quantize_weight(jnp.concatenate(list(weight), axis=1))
    np.testing.assert_array_equal(np.concatenate(list(quantized.qvalue), axis=1), joined.qvalue)
    np.testing.assert_array_equal(quantized.scale[0], joined.scale)
