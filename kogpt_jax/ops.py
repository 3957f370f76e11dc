"""Which implementation runs each op: resolved once, when an engine is built, and printed. Nothing falls back later."""

import logging
from typing import Any, Literal, cast, get_args

import numpy as np

from custom_ops import (
    all_reduce_ffi_problem,
    autotune,
    decode_attention_ffi_problem,
    int8_gemm_ffi_problem,
    library_info,
    linear_ffi_problem,
    mixed_gemm_ffi_problem,
    prefill_attention_ffi_problem,
)
from custom_ops.decode_steps import steps_problem
from custom_ops.linear import MAX_ROWS
from kogpt_jax.collectives import device_groups, num_along
from kogpt_jax.config import DeviceGrid, GemmImplementation, ModelConfig, OpsConfig, Quant
from kogpt_jax.errors import InputError
from kogpt_jax.kv_cache import PAGE_LEN
from kogpt_jax.sharding import VOCAB_AXES

Choice = Literal["auto", "ffi", "reference"]
CHOICES: tuple[str, ...] = get_args(Choice)

# Tokens of prompts read at once for which `linear`, in groups of 64, is faster than what reads more tokens: on a GPU
# beside INT8 weights, on a CPU beside others (docs/performance-notes.md, "Short prompts" and "CPU").
_LINEAR_PREFILL_TOKENS: dict[str, dict[Quant, int]] = {
    "gpu": {"none": 0, "w8a16": 2 * MAX_ROWS, "w8a8": MAX_ROWS},
    "cpu": {"none": MAX_ROWS // 2, "w8a16": 0, "w8a8": 0},
}

_logger = logging.getLogger("kogpt_jax")


def check_choice(choice: str) -> None:
    """Raises `InputError` unless it is one of ``CHOICES``."""
    if choice not in CHOICES:
        raise InputError(f"implementation must be one of {', '.join(CHOICES)}, got {choice!r}")


def resolve_ops(
    config: ModelConfig,
    choice: Choice,
    *,
    platform: str,
    num_shards: int = 1,
    num_stages: int = 1,
    max_rows: int = 1,
    deterministic: bool = False,
    devices: DeviceGrid = (),
) -> OpsConfig:
    """The implementation of each op for a model on a platform ("cpu" or "gpu").

    "auto" takes, op by op, the project's kernel where this machine has one that fits the model and that is the faster:
    on a GPU always; on a CPU for INT8 weights, which XLA would convert to f32 first, and for others where the CPU has
    an instruction set that the kernels are written for: 1.1 to 5.5 times as fast as XLA with AVX-512.
    Beyond the 64 rows of a call "auto" gives other weights to XLA, which reads them once for all rows, and takes INT8
    ones in groups of 64 rows: XLA would write and read them in 16 bits, which is more than a few groups read. "ffi"
    takes groups for both, so that a row has the same bits in a batch of any size. Products of few tokens of whole
    sequences are `linear`'s wherever `linear_prefill_tokens` says. For those of more with INT8 weights "auto" takes
    what was the fastest, where this device has been timed with such products (`custom_ops.autotune`), else the
    project's kernel on a GPU.
    With ``deterministic`` a decode step takes what gives a row the same bits in any place of a batch: the kernels of
    `linear` and `decode_attention`, for "auto" too, and sums over tensor shards in order.
    A decode step's sums over shards are the project's kernel's where all devices are GPUs of this process that NVLink
    links. With several processes they are a library's; where the kernel cannot be had for another reason, "auto" takes
    the library's too and a warning has the reason, and "ffi" is an error.
    Where a step's layers are one call and one stage has all of them, greedy steps are one call, too; what stands
    against it is told by a warning.
    ``max_rows`` is how many rows a data shard of a batch has at most. ``devices`` are CUDA's numbers of the mesh's
    devices, if all belong to this process.

    Raises:
        InputError: an unknown choice, or "ffi" or ``deterministic`` where it cannot work, with the reason.
    """
    check_choice(choice)
    if choice == "reference":
        if deterministic:
            raise InputError("deterministic takes the kernels of decode steps, implementation 'reference' has none")
        return OpsConfig()
    is_quantized = config.quant != "none"
    if choice == "auto" and platform == "cpu" and not (is_quantized or deterministic or _has_vector_code()):
        return OpsConfig()
    cache: dict[str, Any] = {
        "dtype": config.jax_dtype,
        "pages_dtype": config.cache_dtype,
        "head_dim": config.head_dim,
        "page_len": PAGE_LEN,
    }
    problems = {
        "linear": _linear_problem(config, platform, num_shards),
        "decode_attention": decode_attention_ffi_problem(platform=platform, **cache),
    }
    if platform == "gpu":  # what has no kernel for CPUs
        problems["prefill_attention"] = prefill_attention_ffi_problem(platform=platform, batch=max_rows, **cache)
        if is_quantized:
            problems["gemm"] = _gemm_problem(config, platform, num_shards)
    if deterministic:
        for op in ("linear", "decode_attention"):
            if problems[op] is not None:
                raise InputError(f"deterministic cannot be used: it takes the kernel of {op}, but {problems[op]}")
    best: dict[str, Any] = {op: "reference" if problem else "ffi" for op, problem in problems.items()}
    best["linear_prefill_tokens"] = linear_prefill_tokens(config, platform=platform, num_shards=num_shards)
    order: Literal["psum", "in_order"] = "in_order" if deterministic else "psum"
    sums: dict[str, Any] = {"all_reduce": order, "all_reduce_many_values": order}
    if platform == "gpu" and devices and num_along(devices, VOCAB_AXES) > 1:
        problems["all_reduce"] = _all_reduce_problem(devices)
        if problems["all_reduce"] is None:
            sums |= {"all_reduce": "ffi", "devices": devices}
        elif choice == "auto":
            _logger.warning("sums over shards are the collective library's: %s", problems["all_reduce"])
    has_kernels = problems["linear"] is None and problems["decode_attention"] is None
    if has_kernels and (num_shards == 1 or sums["all_reduce"] == "ffi"):
        best["decode_layers"] = "ffi"
        if num_stages == 1:
            problem = steps_problem(config.model_dim, num_shards, config.eos_token_ids)
            if problem is None:
                best["decode_steps"] = "ffi"
            else:
                _logger.warning("greedy steps are not one call: %s", problem)
    if choice == "ffi":
        for op, problem in problems.items():
            if problem is not None:
                raise InputError(f"implementation 'ffi' cannot be used for {op}: {problem}")
        return OpsConfig(linear_many_rows="ffi", **sums, **best)
    gemm: GemmImplementation = "reference"
    if is_quantized:
        gemm, *others = gemm_implementations(config, platform=platform, num_shards=num_shards)
        if others:
            usable, shapes = (gemm, *others), layer_products(config, num_shards)
            fastest = autotune.fastest_implementation(
                platform, gemm_op(config), config.jax_dtype, shapes, usable, above=best["linear_prefill_tokens"]
            )
            gemm = cast(GemmImplementation, fastest or gemm)
    best.pop("gemm", None)
    many_rows: Any = best["linear"] if is_quantized or deterministic else "reference"
    return OpsConfig(**best, linear_many_rows=many_rows, gemm=gemm, **sums)


def _has_vector_code() -> bool:
    """Whether this CPU has an instruction set that the Host library is written for: its portable code is slower than
    XLA in fp16."""
    return library_info()[0].instruction_set not in (None, "portable")


def gemm_implementations(config: ModelConfig, *, platform: str, num_shards: int = 1) -> tuple[GemmImplementation, ...]:
    """What can run the layers' products of whole sequences with INT8 weights on this machine; first what a rule takes
    where nothing has been timed."""
    has_kernel = platform == "gpu" and _gemm_problem(config, platform, num_shards) is None
    if config.quant == "w8a8":
        return ("ffi", "reference") if has_kernel else ("reference",)
    found: list[GemmImplementation] = ["ffi", "reference"] if has_kernel else ["reference"]
    if _linear_problem(config, platform, num_shards) is None:
        found.append("linear")
    return tuple(found)


def linear_prefill_tokens(config: ModelConfig, *, platform: str, num_shards: int = 1) -> int:
    """Up to how many tokens of whole sequences the layers' products are `linear`'s, whatever runs those of more."""
    has_kernel = _linear_problem(config, platform, num_shards) is None
    if not has_kernel or (platform == "cpu" and not _has_vector_code()):
        return 0
    return _LINEAR_PREFILL_TOKENS[platform][config.quant]


def gemm_op(config: ModelConfig) -> str:
    """Which op of `custom_ops` the layers' products of whole sequences are, with INT8 weights."""
    return "int8_gemm" if config.quant == "w8a8" else "mixed_gemm"


def layer_products(config: ModelConfig, num_shards: int = 1) -> list[tuple[int, int]]:
    """(outputs, K) of a layer's two products on one of ``num_shards`` tensor shards."""
    local_dim, local_ffn = config.model_dim // num_shards, config.ffn_dim // num_shards
    return [(3 * local_dim + local_ffn, config.model_dim), (config.model_dim, local_dim + local_ffn)]


def _linear_problem(config: ModelConfig, platform: str, num_shards: int) -> str | None:
    return linear_ffi_problem(
        platform=platform,
        dtype=config.jax_dtype,
        weight_dtype=config.jax_dtype if config.quant == "none" else np.dtype(np.int8),
        k_dims=[k_dim for _, k_dim in layer_products(config, num_shards)],
    )


def _gemm_problem(config: ModelConfig, platform: str, num_shards: int) -> str | None:
    problem = int8_gemm_ffi_problem if config.quant == "w8a8" else mixed_gemm_ffi_problem
    k_dims = [k_dim for _, k_dim in layer_products(config, num_shards)]
    return problem(platform=platform, dtype=config.jax_dtype, k_dims=k_dims)


def _all_reduce_problem(devices: DeviceGrid) -> str | None:
    for axes in (("tensor",), VOCAB_AXES):
        if num_along(devices, axes) > 1:
            problem = all_reduce_ffi_problem(platform="gpu", device_groups=device_groups(devices, axes))
            if problem is not None:
                return problem
    return None


def describe(ops: OpsConfig) -> str:
    """What runs, in one line."""
    as_one_call = "a step's layers as one call" + (", greedy steps too" if ops.decode_steps == "ffi" else "")
    return (
        f"linear {ops.linear} (more than {MAX_ROWS} rows {ops.linear_many_rows}), "
        f"decode_attention {ops.decode_attention}"
        + (f" ({as_one_call})" if ops.decode_layers == "ffi" else "")
        + f", prefill_attention {ops.prefill_attention}, "
        + (f"prompts of up to {tokens} tokens by linear, " if (tokens := ops.linear_prefill_tokens) else "")
        + f"INT8 products of prefill and scoring {ops.gemm}"
        + {"psum": "", "in_order": ", sums over shards in order", "ffi": ", sums over shards ffi"}[ops.all_reduce]
    )
