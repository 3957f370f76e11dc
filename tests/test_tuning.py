"""What `ops.resolve_ops` takes from the times of `custom_ops.autotune`, and the way that only they choose."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
from small_model import KERNEL_CONFIG

from custom_ops import LibraryInfo, _library, autotune, quantize_weight
from custom_ops.autotune import Choice, Device, Key, Timing
from kogpt_jax import ops, tuning
from kogpt_jax.config import ModelConfig
from kogpt_jax.errors import InputError
from kogpt_jax.ops import layer_products, resolve_ops

QUANTIZED = dataclasses.replace(KERNEL_CONFIG, quant="w8a16")
W8A8 = dataclasses.replace(KERNEL_CONFIG, quant="w8a8")


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with both libraries and what fits the model."""
    for op in ("linear", "decode_attention", "prefill_attention", "int8_gemm", "mixed_gemm"):
        monkeypatch.setattr(ops, f"{op}_ffi_problem", lambda **_: None)


@pytest.fixture
def times(tmp_path, monkeypatch):
    """Keeps times of the layers' products of a model on a made-up device."""
    device = Device("device", "1")
    monkeypatch.setattr(autotune, "_user_folder", tmp_path)
    monkeypatch.setattr(autotune, "find_device", lambda platform: device)

    def keep(config: ModelConfig, num_shards: int = 1, **us: float) -> None:
        entry = tuple(Timing(Choice(name), time) for name, time in us.items())
        keys = [
            Key.of(ops.gemm_op(config), config.jax_dtype, *shape, 300) for shape in layer_products(config, num_shards)
        ]
        autotune.save(device, dict.fromkeys(keys, entry))

    yield keep
    autotune._load_table.cache_clear()


@pytest.mark.usefixtures("all_there")
def test_auto_takes_what_was_the_fastest(times):
    def gemm(config: ModelConfig, platform: str, num_shards: int = 1) -> str:
        return resolve_ops(config, "auto", platform=platform, num_shards=num_shards).gemm

    times(QUANTIZED, reference=3, ffi=1, linear=2)
    times(W8A8, reference=1, ffi=2)
    assert gemm(QUANTIZED, "gpu") == "ffi"
    assert gemm(QUANTIZED, "cpu") == "linear"  # there is no kernel for CPUs
    assert gemm(W8A8, "gpu") == "reference"
    assert gemm(W8A8, "cpu") == "reference"
    assert gemm(dataclasses.replace(QUANTIZED, dtype="bf16"), "gpu") == "ffi"  # which has not been measured
    assert gemm(dataclasses.replace(QUANTIZED, ffn_dim=224), "gpu") == "ffi"
    assert gemm(QUANTIZED, "gpu", num_shards=2) == "ffi"
    times(QUANTIZED, num_shards=2, reference=2, linear=1)
    assert gemm(QUANTIZED, "gpu", num_shards=2) == "linear"
    assert resolve_ops(QUANTIZED, "ffi", platform="gpu").gemm == "ffi"
    assert resolve_ops(QUANTIZED, "reference", platform="gpu").gemm == "reference"
    assert resolve_ops(KERNEL_CONFIG, "auto", platform="gpu").gemm == "reference"


def test_a_gpu_that_was_not_measured_is_told_of_once(all_there, times, monkeypatch, caplog):
    monkeypatch.setattr(autotune, "_told", set())
    for _ in range(2):
        assert resolve_ops(QUANTIZED, "auto", platform="gpu").gemm == "ffi"
        assert resolve_ops(QUANTIZED, "auto", platform="cpu").gemm == "reference"
        assert resolve_ops(W8A8, "auto", platform="gpu").gemm == "ffi"
    said = [record.getMessage() for record in caplog.records]
    assert [message.split()[0] for message in said] == ["mixed_gemm", "int8_gemm"]


@pytest.mark.usefixtures("all_there")
def test_what_linear_reads_in_any_case_is_not_measured(monkeypatch):
    monkeypatch.setattr(tuning, "_tiles", lambda config: ("a", "b"))

    def rows(config: ModelConfig, numbers: list[int], platform: str = "gpu") -> list[int]:
        return [problem.key.rows for problem in tuning.make_problems([config], numbers, platform=platform)]

    assert rows(QUANTIZED, [16, 128, 129, 512]) == [512, 256] * 2
    assert rows(QUANTIZED, [16, 512], "cpu") == [512, 16] * 2
    assert rows(W8A8, [16, 64, 65, 512]) == [512, 128] * 2
    with pytest.raises(InputError, match="there is nothing to measure"):
        rows(QUANTIZED, [128])


@pytest.mark.usefixtures("all_there")
@pytest.mark.parametrize("quant", ["w8a16", "w8a8"])
def test_every_way_of_a_gpu_is_called_as_it_is_named(quant, monkeypatch):
    """As far as tracing shows: which calls, and with which tile."""
    tiles = {"int8_gemm": ("a", "b", "c"), "mixed_gemm": ("d", "e")}
    library = LibraryInfo("cuda", "lib.so", problem=None, gemm_hash="2", tiles=tiles)
    monkeypatch.setattr(_library, "load", lambda platform: library)
    config = dataclasses.replace(QUANTIZED, quant=quant, dtype="bf16")
    problems = tuning.make_problems([config], [150], platform="gpu")
    assert len(problems) == 2
    ffi = {"": -1} | {name: index for index, name in enumerate(tiles[ops.gemm_op(config)])}
    for problem in problems:
        key, dtype = problem.key, config.jax_dtype
        x: Any = jax.ShapeDtypeStruct((key.rows, key.k_dim), dtype)
        weight, rows = (
            jax.eval_shape(quantize_weight, jax.ShapeDtypeStruct((extent, key.k_dim), np.float32))
            for extent in (key.num_outputs, key.rows)
        )
        is_in = problem.num_plain is not None
        bias = jax.ShapeDtypeStruct((config.ffn_dim if is_in else key.num_outputs,), dtype)
        residual = None if is_in else jax.ShapeDtypeStruct((key.rows, key.num_outputs), np.float32)
        found = {}
        for choice in tuning._choices(problem):
            operands = (rows if quant == "w8a8" else x, weight, bias, residual)
            before = jax.ShapeDtypeStruct((), np.float32)
            text = str(jax.make_jaxpr(tuning._candidate(choice, problem).run)(before, operands))
            targets = re.findall(r"target_name=(\w+)", text)
            indices = [int(index) for index in re.findall(r"'tile', (?:np\.int64\()?(-?\d+)", text)]
            found[str(choice)] = (targets, indices)
        expected: dict[str, tuple[list[str], list[int]]] = {"reference": ([], [])}
        expected |= {f"ffi {name}".strip(): ([f"kogpt_{key.op}"], [index]) for name, index in ffi.items()}
        if quant == "w8a16":
            expected["linear"] = (["kogpt_linear"], [])
        assert found == expected
