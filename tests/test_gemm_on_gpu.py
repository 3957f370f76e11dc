"""The CUDA kernels of `custom_ops.int8_gemm` and `mixed_gemm`: against the references' own error, and what must not
depend on anything."""

import dataclasses

import gemm_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from gemm_cases import CASES, OPS, GemmCase, gemm_arguments
from jax.sharding import PartitionSpec
from op_cases import case_id
from test_gemm import test_int8_sums_are_exact, test_reference_against_f64

import custom_ops

__all__ = ["test_int8_sums_are_exact", "test_reference_against_f64"]

pytestmark = pytest.mark.gpu


def tiles(op):
    """Names of the ways to cut a product that the library has for this GPU."""
    return custom_ops.library_info()[1].tiles[op]


def jitted(op, case, **options):
    options = {"implementation": "ffi"} | options

    def call(arguments):
        results = gemm_cases.outputs(case, *gemm_cases.call(op, case, arguments, **options))
        return {name: value for name, (value, _) in results.items()}

    return jax.jit(call)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_at_most_twice_the_references(op, case):
    arguments = gemm_arguments(op, case)
    expected = gemm_cases.oracle(case, arguments)
    reference = jitted(op, case, implementation="reference")(arguments)
    run = jitted(op, case)
    run(gemm_cases.poison(arguments))  # what is not written holds NaN, or what another call has left
    results = run(arguments)
    again = run(arguments)
    for name, value in results.items():
        dtype = case.dtype if name == "act" else "fp32" if case.y == "f32" else case.y
        error = tolerances.relative_error(reference[name], expected[name])
        tensor_core_k = case.k if op == "mixed_gemm" else 0  # INT8 products are summed exactly
        rule = tolerances.twice_the_references_error(error, dtype, tensor_core_k=tensor_core_k)
        tolerances.assert_close(value, expected[name], rule, name)
        np.testing.assert_array_equal(value, again[name])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [case for case in CASES if case.outputs % 8 == 0], ids=case_id)
def test_every_tile_gives_the_same_bits(op, case):
    arguments = gemm_arguments(op, case)
    expected = jitted(op, case, tile=-1)(arguments)
    assert len(set(tiles(op))) == len(tiles(op)) > 0
    for tile in range(len(tiles(op))):
        run = jitted(op, case, tile=tile)
        run(gemm_cases.poison(arguments))
        jax.tree.map(np.testing.assert_array_equal, run(arguments), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case",
    [
        GemmCase(5000, 304, 528, y="bf16", gelu_from=104, act_dim=264, bias=True),
        GemmCase(1100, 99, 1040, "fp16", bias=True, residual=True),
    ],
    ids=case_id,
)
def test_a_row_is_the_same_bits_in_every_batch(op, case):
    arguments = gemm_arguments(op, case)
    expected = jax.tree.map(np.asarray, jitted(op, case)(arguments))
    rng = np.random.default_rng(5)
    for rows in (1, 65, 128, 1025):
        chosen = np.sort(rng.permutation(case.rows)[:rows])[::-1]
        part = gemm_cases.rows_of(arguments, chosen)
        got = jitted(op, dataclasses.replace(case, rows=rows))(part)
        for name, value in got.items():
            np.testing.assert_array_equal(np.asarray(value), expected[name][chosen])


@pytest.mark.parametrize("op", OPS)
def test_not_a_number_shows_in_its_row_alone(op):
    case = GemmCase(70, 136, 64, bias=True, residual=True)
    arguments = gemm_arguments(op, case)
    clean = np.asarray(jitted(op, case)(arguments)["y"])
    x = arguments["x"]
    x = dataclasses.replace(x, scale=x.scale.at[7].set(jnp.nan)) if op == "int8_gemm" else x.at[7, 3].set(jnp.nan)
    y = np.asarray(jitted(op, case)(arguments | {"x": x})["y"])
    assert np.all(np.isnan(y[7]))
    np.testing.assert_array_equal(np.delete(y, 7, axis=0), np.delete(clean, 7, axis=0))


@pytest.mark.parametrize("op", OPS)
def test_inside_shard_map_nothing_is_gathered(op):
    case = GemmCase(66, 128, 64)
    arguments = gemm_arguments(op, case)
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])

    def local(x, weight):
        return gemm_cases.call(op, case, {"x": x, "weight": weight}, implementation="ffi")[0]

    in_specs = (PartitionSpec(), PartitionSpec("tensor", None))
    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(None, "tensor"), check_vma=False)
    )
    text = run.lower(arguments["x"], arguments["weight"]).compile().as_text()
    assert text is not None
    assert "all-gather" not in text
    np.testing.assert_array_equal(run(arguments["x"], arguments["weight"]), jitted(op, case)(arguments)["y"])


@pytest.mark.parametrize("op", OPS)
def test_vmap_raises(op):
    case = GemmCase(2, 8, 16)
    arguments = gemm_arguments(op, case)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), arguments["x"])
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda x: gemm_cases.call(op, case, arguments | {"x": x}, implementation="ffi"))(stacked)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (GemmCase(3, 8, 24), {}, "K must be a multiple of 16, got 24"),
        (GemmCase(0, 8, 16), {}, "x must have 1 to 16777216 rows"),
        (GemmCase(3, 8, 16, "fp32"), {}, "dtype must be float16 or bfloat16"),
    ],
    ids=lambda value: case_id(value) if isinstance(value, GemmCase) else None,
)
def test_what_the_kernels_do_not_support_is_refused_by_name(op, case, options, message):
    with pytest.raises(ValueError, match=message):
        gemm_cases.call(op, case, gemm_arguments(op, case), implementation="ffi", **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tile", [-2, "the first that is not there", 99])
def test_a_tile_that_is_not_there_is_refused(op, tile):
    case = GemmCase(3, 8, 16)
    index = tile if isinstance(tile, int) else len(tiles(op))
    with pytest.raises(jax.errors.JaxRuntimeError, match="tile must be -1 or an index of the device's tiles"):
        jax.block_until_ready(jitted(op, case, tile=index)(gemm_arguments(op, case)))


@pytest.mark.parametrize("op", OPS)
def test_odd_sizes_take_every_tile(op):
    """Hopper's kernels do not take them; what does has one way, whichever tile it is told."""
    case = GemmCase(70, 99, 48, bias=True)
    arguments = gemm_arguments(op, case)
    expected = jitted(op, case, tile=-1)(arguments)
    for tile in range(len(tiles(op))):
        jax.tree.map(np.testing.assert_array_equal, jitted(op, case, tile=tile)(arguments), expected)


def test_the_ops_can_be_used():
    for op in (*OPS, "quantize_rows"):
        problem = getattr(custom_ops, f"{op}_ffi_problem")
        assert problem(platform="gpu", dtype=jnp.bfloat16, k_dims=(64, 4096)) is None
        assert "K must be a multiple of 16, got 24" in problem(platform="gpu", dtype=jnp.bfloat16, k_dims=(64, 24))
