"""What ``kogpt autotune`` measures: a layer's products of whole sequences with INT8 weights, each way they can run.

`custom_ops.autotune` times them and keeps the result; `ops.resolve_ops` and the ops look it up.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from custom_ops import (
    QuantizedArray,
    autotune,
    int8_gemm,
    int8_gemm_reference,
    library_info,
    mixed_gemm,
    mixed_gemm_reference,
    quantize_rows,
    quantize_weight,
)
from custom_ops.autotune import Candidate, Choice, Key
from kogpt_jax import checkpoint, demo
from kogpt_jax.config import DEMO, KOGPT_6B, Dtype, GemmImplementation, ModelConfig, OpsConfig, Quant
from kogpt_jax.errors import InputError, one_line
from kogpt_jax.model import model_def, prefill_linear
from kogpt_jax.ops import gemm_implementations, gemm_op, layer_products, linear_prefill_tokens
from kogpt_jax.progress import progress_bar
from kogpt_jax.sharding import Split

# Of prompts from the shortest bucket to a batch that fills the context some times over.
DEFAULT_ROWS = tuple(2**exponent for exponent in range(4, 14))

# Several times an H100's L2 of 50 MB: what the weights take that are rotated over, if a model has so many.
_ENOUGH_BYTES = 2**28

_BY_SHAPE = Choice("ffi")

# x, weight, bias, residual.
_Operands = tuple[Array | QuantizedArray, QuantizedArray, Array, Array | None]

SHAPES = {"kogpt-6b": KOGPT_6B, "demo": DEMO}


def load_configs(
    model: str | None, shape: str | None, dtype: Dtype | None, quants: Sequence[Quant]
) -> list[ModelConfig]:
    """The configuration of a model directory (weights unread), of "demo", which is the default, or of one of `SHAPES`,
    with each of ``quants``.

    Raises:
        InputError: both are given, or what loading the configuration refuses.
    """
    if model is not None and shape is not None:
        raise InputError(f"--model {model} and --shape {shape} exclude each other")
    if shape is not None:
        config = SHAPES[shape]
        config = dataclasses.replace(config, dtype=dtype or config.dtype)
    else:
        directory = demo.DIRECTORY if model in (None, "demo") else pathlib.Path(str(model))
        config = checkpoint.load_config(directory, dtype=dtype)
    return [dataclasses.replace(config, quant=quant) for quant in quants]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product of a model on one device: sizes, and what stands behind it."""

    key: Key
    config: ModelConfig
    implementations: tuple[GemmImplementation, ...]  # what can run it here; the rule's first
    num_plain: int | None  # outputs before those of GELU; None: all, with a residual
    act_dim: int | None

    def __str__(self) -> str:
        key = self.key
        return f"{key.op} {key.dtype} {key.num_outputs} x {key.k_dim}, {key.rows} rows"


@dataclasses.dataclass(frozen=True)
class Result:
    """What runs a product without what was measured, with it, and what was found wrong."""

    key: Key
    before: Choice
    before_us: float | None  # None: it did not give a right result
    after: autotune.Timing | None  # None: no candidate did
    rejected: tuple[tuple[Choice, str], ...]


def make_problems(
    configs: Sequence[ModelConfig], rows: Sequence[int], *, platform: str, num_shards: int = 1
) -> list[Problem]:
    """The products that can run in more than one way on this machine, of models that differ in dtype and ``quant``.

    Raises:
        InputError: a number of rows below 1, tensor shards that the model cannot be cut into, or nothing to choose.
    """
    for number in rows:
        if number < 1:
            raise InputError(f"--rows must be at least 1, got {number}")
    problems = []
    for config in configs:
        model_def(config, Split(num_shards=num_shards))  # which refuses what cannot be cut so
        implementations = gemm_implementations(config, platform=platform, num_shards=num_shards)
        (in_outputs, dim), (_, act_dim) = layer_products(config, num_shards)
        # Many rows first: what counts most is there if the rest is broken off.
        by_linear = linear_prefill_tokens(config, platform=platform, num_shards=num_shards)
        buckets = sorted(
            {Key.of("", config.jax_dtype, 1, 1, number).rows for number in rows if number > by_linear}, reverse=True
        )
        in_keys = [Key.of(gemm_op(config), config.jax_dtype, in_outputs, dim, bucket) for bucket in buckets]
        out_keys = [dataclasses.replace(key, num_outputs=dim, k_dim=act_dim) for key in in_keys]
        problems += [Problem(key, config, implementations, 3 * (dim // num_shards), act_dim) for key in in_keys]
        problems += [Problem(key, config, implementations, None, None) for key in out_keys]
    problems = [problem for problem in problems if len(list(_choices(problem))) > 1]
    if not problems:
        names = ", ".join(sorted({f"{config.quant} in {config.dtype}" for config in configs}))
        raise InputError(
            f"there is nothing to measure: one way only to run {names} on {platform} "
            f"at {', '.join(map(str, rows))} rows (kogpt info says what was built)"
        )
    return problems


def tune_products(
    problems: Sequence[Problem], *, platform: str, progress: bool = False
) -> tuple[list[Result], pathlib.Path]:
    """Measures one product after the other and keeps each in the user's file at once.

    Args:
        problems: at least one.
        platform: "cpu" or "gpu".
        progress: show a progress bar, if stderr is a terminal.

    Returns:
        What was found, and the file.

    Raises:
        InputError: the file cannot be written.
    """
    device = autotune.find_device(platform)
    assert device is not None  # there is a choice, so there is a library
    path = _keep(device, {})  # before minutes are spent
    results = []
    with progress_bar(len(problems), progress) as advance:
        for problem in problems:
            advance(str(problem), 0)
            weights = _weights(problem.key.num_outputs, problem.key.k_dim, problem.config.num_layers)
            outcome = measure(problem, weights)
            kept = tuple(timed for timed in outcome.timings if timed.choice != _BY_SHAPE)
            if kept:
                _keep(device, {problem.key: kept})
            before = next(_choices(problem))
            after = kept[0] if kept else None
            results.append(Result(problem.key, before, outcome.us(before), after, outcome.rejected))
            advance(str(problem), 1)
    return results, path


def _keep(device: autotune.Device, entries: autotune.Table) -> pathlib.Path:
    try:
        return autotune.save(device, entries)
    except OSError as error:
        raise InputError(f"times of products cannot be kept: {one_line(error)}") from error


def table_lines(results: Sequence[Result]) -> Iterator[str]:
    """What the rule by shape takes and what was the fastest, a line a product; times in microseconds."""
    columns = "{:<11} {:<9} {:>8} {:>7} {:>6}  {:>11} {:<32} {:>11} {}"
    yield columns.format("op", "dtype", "outputs", "K", "rows", "by rule, us", "", "fastest, us", "").rstrip()
    for result in results:
        key = result.key
        sizes = (key.op, key.dtype, key.num_outputs, key.k_dim, key.rows)
        before_us = "-" if result.before_us is None else f"{result.before_us:.1f}"
        after = ("-", "") if result.after is None else (f"{result.after.us:.1f}", str(result.after.choice))
        yield columns.format(*sizes, before_us, str(result.before), *after).rstrip()


def measure(problem: Problem, weights: Sequence[QuantizedArray]) -> autotune.Outcome:
    """Times the ways to one product over random data, its weights on the device."""
    key, dtype = problem.key, problem.config.jax_dtype
    num_gelu = 0 if problem.num_plain is None else key.num_outputs - problem.num_plain
    activations = _random(0, (key.rows, key.k_dim), dtype)
    x = quantize_rows(activations, implementation="reference") if key.op == "int8_gemm" else activations
    bias = _random(1, (num_gelu or key.num_outputs,), dtype)
    residual = None if num_gelu else _random(2, (key.rows, key.num_outputs), jnp.float32)

    def reference(operands: _Operands, dtype: Any = dtype) -> tuple[Array, Array | None]:
        x, weight, bias, residual = operands
        options = {"bias": bias.astype(dtype), "residual": residual, "out_dtype": None, **_gelu(problem)}
        if isinstance(x, QuantizedArray):
            return int8_gemm_reference(x, weight, dtype=jnp.dtype(dtype), **options)
        return mixed_gemm_reference(x.astype(dtype), weight, **options)

    return autotune.tune(
        [_candidate(choice, problem) for choice in _choices(problem)],
        [(x, weight, bias, residual) for weight in weights],
        reference=reference,
        oracle=functools.partial(reference, dtype=jnp.float32),
        num_gelu=num_gelu,
        # INT8 products are summed exactly.
        tensor_core_k=key.k_dim if key.op == "mixed_gemm" and jax.default_backend() == "gpu" else 0,
    )


def _gelu(problem: Problem) -> dict[str, int | None]:
    return {"gelu_from": problem.num_plain, "act_dim": problem.act_dim}


def _choices(problem: Problem) -> Iterator[Choice]:
    """The ways to run it, that of the rule first."""
    for implementation in problem.implementations:
        tiles = _tiles(problem.config) if implementation == "ffi" else ()
        if len(tiles) != 1:
            yield Choice(implementation)
        yield from (Choice(implementation, tile) for tile in tiles)


def _tiles(config: ModelConfig) -> tuple[str, ...]:
    """Of the kernels for this machine's GPU."""
    return next(library for library in library_info() if library.name == "cuda").tiles.get(gemm_op(config), ())


def _candidate(choice: Choice, problem: Problem) -> Candidate:
    config, implementation = problem.config, cast(GemmImplementation, choice.implementation)
    tile = None
    if implementation == "ffi":
        tile = autotune.TILE_BY_SHAPE if choice.tile is None else _tiles(config).index(choice.tile)

    def run(before: Array, operands: _Operands) -> tuple[Array, Array | None]:
        x, weight, bias, residual = operands
        weight = QuantizedArray(weight.qvalue, weight.scale + before)
        options: dict[str, Any] = {"bias": bias, "residual": residual, **_gelu(problem)}
        if isinstance(x, QuantizedArray):
            return int8_gemm(x, weight, dtype=config.jax_dtype, tile=tile, implementation=implementation, **options)
        if implementation == "ffi":
            return mixed_gemm(x, weight, tile=tile, implementation="ffi", **options)
        return prefill_linear(x, weight, config, OpsConfig(gemm=implementation), **options)

    rounds = implementation == "linear" and jax.default_backend() == "gpu"
    return Candidate(choice, run, _as_integers if rounds else None)


def _as_integers(operands: _Operands) -> Any:
    """Activations rounded to the 16-bit integers that `custom_ops.linear` has on sm_90a beside an INT8 weight, with a
    scale for each 256 columns of a row."""
    x = jnp.asarray(operands[0], jnp.float32)
    rows, k_dim = x.shape
    groups = jnp.pad(x, ((0, 0), (0, -k_dim % 256))).reshape(rows, -1, 256)
    scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=2, keepdims=True), 1e-30) / 32639
    rounded = (jnp.round(groups / scale) * scale).reshape(rows, -1)[:, :k_dim]
    return (rounded, *operands[1:])


@functools.lru_cache(maxsize=1)  # for all rows; the weights before are freed
def _weights(num_outputs: int, k_dim: int, num_layers: int) -> tuple[QuantizedArray, ...]:
    """As many as a model has, or more bytes than a cache holds."""
    count = max(2, min(num_layers, -(-_ENOUGH_BYTES // (num_outputs * k_dim))))
    make = jax.jit(lambda seed: quantize_weight(_random(seed, (num_outputs, k_dim), jnp.float32, k_dim**-0.5)))
    return tuple(make(3 + layer) for layer in range(count))


def _random(seed: int | Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)
