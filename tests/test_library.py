"""The compiled libraries: which are found, which fit, and what misuse that only C++ can see comes to."""

import ctypes
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import custom_ops
import kogpt_jax
from custom_ops import _library

# -- Does it fit? -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "jaxlib_version", "fits"),
    [
        ((0, 3), (0, 3), True),
        ((0, 3), (0, 5), True),
        ((0, 4), (0, 3), False),
        ((0, 3), (1, 3), False),
        ((1, 0), (0, 9), False),
        ((0, 3), None, False),
    ],
)
def test_ffi_version_problem(library, jaxlib_version, fits):
    assert (_library.ffi_version_problem(library, jaxlib_version) is None) == fits


def test_the_running_jaxlib_tells_its_ffi_version():
    version = _library.jaxlib_ffi_version()
    assert version is not None
    major, minor = version
    assert major == 0
    assert minor >= 3  # jaxlib 0.10.2, the oldest that is supported


@pytest.mark.parametrize(
    ("driver", "runtime", "capability", "part"),
    [
        (13000, 13000, 90, None),
        (13010, 13000, 80, None),
        (12080, 12040, 80, None),
        (13000, 13000, 86, None),  # code for 8.0 runs on 8.6
        (13000, 13000, 100, None),  # from PTX
        (0, 13000, 0, "no driver"),
        (13000, 13000, 0, "no NVIDIA GPU"),
        (12080, 13000, 90, "driver for CUDA 13"),
        (13000, 13000, 75, "capability 7.5"),
    ],
)
def test_cuda_problem(driver, runtime, capability, part):
    problem = _library.cuda_problem(driver, runtime, capability, ("sm_90a", "sm_80", "compute_80"))
    assert (problem is None) if part is None else (part in str(problem))


@pytest.mark.parametrize(("capability", "fits"), [(80, False), (90, True), (100, False)])
def test_code_of_one_architecture_runs_on_that_alone(capability, fits):
    assert (_library.cuda_problem(13000, 13000, capability, ("sm_90a",)) is None) == fits


def test_architecture_names():
    names = [_library._architecture_names(name) for name in ("90a-real", "80-virtual", "75")]
    assert names == [("sm_90a",), ("compute_80",), ("sm_75", "compute_75")]


# -- Loading ----------------------------------------------------------------------------------------------------------


class FakeLibrary(ctypes.CDLL):
    """Answers as a compiled library does, built against version 0.9 of the FFI; without any op."""

    def __init__(self, path):
        self.KogptOpsCudaArchitectures = lambda: b""
        self.KogptOpsCompilers = lambda: b"GNU 1.2"
        self.KogptOpsVersion = lambda: b"1.2.3"
        self.KogptOpsSourceHash = lambda: b"0123456789abcdef"
        self.KogptOpsGemmHash = lambda: b"fedcba9876543210"
        self.KogptOpsHostIsa = lambda: b"avx2"

    def KogptOpsFfiVersion(self, major, minor):
        major._obj.value, minor._obj.value = 0, 9

    def __getattr__(self, name):
        raise AttributeError(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only folder in which libraries are looked for."""
    monkeypatch.setattr(custom_ops, "__path__", [str(tmp_path)])
    return tmp_path


def load_anew(platform):
    return _library._load.__wrapped__(platform)


def test_a_library_for_a_newer_ffi_is_refused_before_it_is_registered(folder, monkeypatch):
    (folder / "libkogpt_ops_host.so").touch()
    monkeypatch.setattr(ctypes, "CDLL", FakeLibrary)
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **kwargs: registered.append(args))
    info = load_anew("cpu")
    assert info.ffi_version == (0, 9)
    assert info.compilers == ("GNU 1.2",)
    assert (info.version, info.source_hash, info.gemm_hash) == ("1.2.3", "0123456789abcdef", "fedcba9876543210")
    for part in ("0.9", "jaxlib " + importlib.metadata.version("jaxlib"), "newer jaxlib"):
        assert part in info.problem
    assert registered == []


@pytest.mark.host
def test_jax_goes_on_after_a_library_was_refused():
    """The real library, beside a jaxlib that says it is older."""
    code = """
import jax, jax.numpy as jnp
import custom_ops
from custom_ops import _library
_library.jaxlib_ffi_version = lambda: (0, 1)
print(custom_ops.linear_ffi_problem(platform="cpu", dtype="float32", weight_dtype="float32", k_dims=[16]))
try:
    _library.register_targets()
except ValueError as error:
    print(error)
print(jax.jit(lambda x: x + 1)(jnp.float32(1)))
"""
    lines = run(code).splitlines()
    assert "version 0." in lines[0]
    assert "has 0.1" in lines[1]
    assert lines[2] == "2.0"


def test_tiles_are_those_of_the_machines_gpu(monkeypatch):
    """Asked of the library by op and compute capability, and of no one else."""
    library = FakeLibrary("")
    library.KogptOpsCudaArchitectures = lambda: b"90a-real"

    def machine(driver, runtime, capability):
        driver._obj.value, runtime._obj.value, capability._obj.value = 13000, 13000, 90

    monkeypatch.setattr(library, "KogptOpsCudaMachine", machine, raising=False)
    monkeypatch.setattr(_library, "jaxlib_ffi_version", lambda: (0, 9))
    read = ("cuda", pathlib.Path("fake.so"), library)
    assert _library._read_info(*read).tiles == {}  # without CUTLASS's headers

    def tiles(op, capability):
        return b"128x256 swizzle 1," + op + b" %d" % capability.value

    monkeypatch.setattr(library, "KogptOpsGemmTiles", tiles, raising=False)
    info = _library._read_info(*read)
    assert info.problem is None
    assert info.tiles == {op: ("128x256 swizzle 1", f"{op} 90") for op in ("int8_gemm", "mixed_gemm")}


def test_a_file_that_is_no_library_is_named(folder):
    (folder / "libkogpt_ops_host.so").write_text("no library")
    info = load_anew("cpu")
    assert info.path == str(folder / "libkogpt_ops_host.so")
    assert "cannot be loaded" in info.problem


def test_a_library_without_an_op_is_named(folder, monkeypatch):
    (folder / "libkogpt_ops_host.so").touch()
    monkeypatch.setattr(ctypes, "CDLL", FakeLibrary)
    monkeypatch.setattr(_library, "jaxlib_ffi_version", lambda: (0, 9))
    assert "Linear" in load_anew("cpu").problem


def test_nothing_built(folder):
    assert [load_anew(platform).problem for platform in ("cpu", "gpu")] == ["it was not built"] * 2
    assert "no" in str(load_anew("tpu").problem)


def test_the_newer_of_two_libraries_counts(folder, monkeypatch):
    other = folder / "other"
    other.mkdir()
    monkeypatch.setattr(custom_ops, "__path__", [str(folder), str(other)])
    for number, directory in enumerate((folder, other)):
        path = directory / "libkogpt_ops_host.so"
        path.touch()
        os.utime(path, (number, number))
    assert _library._find("libkogpt_ops_host.so") == other / "libkogpt_ops_host.so"
    os.utime(folder / "libkogpt_ops_host.so", (2, 2))
    assert _library._find("libkogpt_ops_host.so") == folder / "libkogpt_ops_host.so"


def test_register_targets_without_any_library(monkeypatch):
    monkeypatch.setattr(_library, "load", lambda platform: _library.LibraryInfo("host", problem="it was not built"))
    with pytest.raises(ValueError, match='"ffi" has no library.*not built'):
        _library.register_targets()


@pytest.mark.host
def test_library_info():
    host, cuda = custom_ops.library_info()
    assert (host.name, host.problem, host.architectures) == ("host", None, ())
    assert pathlib.Path(str(host.path)).is_file()
    assert host.compilers
    assert host.version == kogpt_jax.__version__
    assert re.fullmatch("[0-9a-f]{16}", str(host.source_hash))
    assert host.instruction_set in ("portable", "avx2", "avx512")
    assert not host.tiles
    assert cuda.name == "cuda"


def run(code):
    """Standard output of a process of its own."""
    command = [sys.executable, "-c", code]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_importing_loads_no_library_and_starts_no_backend():
    code = """
import ctypes
ctypes.CDLL = None
import custom_ops
import jax._src.xla_bridge as bridge
print(bridge.backends_are_initialized())
"""
    assert run(code) == "False\n"


# -- Misuse that only C++ sees: ffi_call itself checks nothing --------------------------------------------------------


def make_operands(target):
    """Arguments and results by name; of `linear` with everything: LayerNorm, multiplier, residual, INT8 and GELU on 8
    of 24 outputs. Of `decode_layers` and `decode_steps` one layer, a head of 24 tokens, and 4 steps."""
    bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    layers: dict[str, tuple[Any, ...]] = {
        "page_table": (i32, 2, 2),
        "semaphores": (i32, custom_ops.NUM_SEMAPHORES),
        "lm_head": (bf16, 24, 32),
        "lm_head_scale": (f32, 0),
        "lm_head_bias": (bf16, 24),
        "ln_f_scale": (bf16, 32),
        "ln_f_bias": (bf16, 32),
        "ln_scale": (bf16, 32),
        "ln_bias": (bf16, 32),
        "w_in": (bf16, 3 * 2 * 64 + 32, 32),
        "w_in_scale": (f32, 0),
        "b_ffn_in": (bf16, 32),
        "w_out": (bf16, 32, 160),
        "w_out_scale": (f32, 0),
        "k_multiplier": (f32, 160),
        "b_ffn_out": (bf16, 32),
        "k_pages": (bf16, 5, 2, 16, 64),
        "k_scales": (f32, 0),
        "v_pages": (bf16, 5, 2, 16, 64),
        "v_scales": (f32, 0),
    }
    layers_results: dict[str, tuple[Any, ...]] = {
        "result y": (f32, 2, 32),
        "result logits": (f32, 2, 24),
        "result semaphores": (i32, custom_ops.NUM_SEMAPHORES),
        "result other_x": (f32, 2, 32),
        "result qkv": (bf16, 2, 3 * 2 * 64),
        "result act": (bf16, 2, 160),
        "result h": (bf16, 2, 160),
        "result part": (f32, 0, 32),
        "result linear_partials": (f32, (192 * 256 + 513) * 8),
        "result attention_partials": (f32, 2 * 2 * 66),
        "result k_pages": (bf16, 5, 2, 16, 64),
        "result k_scales": (f32, 0),
        "result v_pages": (bf16, 5, 2, 16, 64),
        "result v_scales": (f32, 0),
    }
    shapes: dict[str, dict[str, tuple[Any, ...]]] = {
        "kogpt_linear": {
            "x": (f32, 2, 32),
            "weight": (jnp.int8, 24, 32),
            "weight_scale": (f32, 24),
            "bias": (bf16, 8),
            "ln_scale": (bf16, 32),
            "ln_bias": (bf16, 32),
            "k_multiplier": (f32, 32),
            "residual": (f32, 2, 16),
            "semaphores": (i32, custom_ops.NUM_SEMAPHORES),
            "result y": (f32, 2, 16),
            "result act": (bf16, 2, 40),
            "result h": (bf16, 2, 32),
            "result partials": (f32, (192 * 256 + 513) * 8),
            "result semaphores": (i32, custom_ops.NUM_SEMAPHORES),
        },
        "kogpt_decode_attention": {
            "qkv": (bf16, 2, 3 * 2 * 64),
            "cos": (f32, 2, 16),
            "sin": (f32, 2, 16),
            "k_pages": (bf16, 5, 2, 16, 64),
            "k_scales": (f32, 0),
            "v_pages": (bf16, 5, 2, 16, 64),
            "v_scales": (f32, 0),
            "page_table": (i32, 2, 2),
            "lengths": (i32, 2),
            "num_new": (i32, 2),
            "act": (bf16, 2, 160),
            "semaphores": (i32, custom_ops.NUM_SEMAPHORES),
            "result act": (bf16, 2, 160),
            "result k_pages": (bf16, 5, 2, 16, 64),
            "result k_scales": (f32, 0),
            "result v_pages": (bf16, 5, 2, 16, 64),
            "result v_scales": (f32, 0),
            "result partials": (f32, 2 * 2 * 66),
            "result semaphores": (i32, custom_ops.NUM_SEMAPHORES),
        },
        "kogpt_prefill_attention": {
            "qkv": (bf16, 70, 3 * 2 * 64),
            "cos": (f32, 70, 16),
            "sin": (f32, 70, 16),
            "k_pages": (bf16, 5, 2, 64, 64),
            "k_scales": (f32, 0),
            "v_pages": (bf16, 5, 2, 64, 64),
            "v_scales": (f32, 0),
            "page_table": (i32, 2, 2),
            "begins": (i32, 2),
            "num_new": (i32, 2),
            "lengths": (i32, 2),
            "act": (bf16, 70, 160),
            "result act": (bf16, 70, 160),
            "result k_pages": (bf16, 5, 2, 64, 64),
            "result k_scales": (f32, 0),
            "result v_pages": (bf16, 5, 2, 64, 64),
            "result v_scales": (f32, 0),
            "result tiles": (i32, 3, 4),
        },
        "kogpt_decode_layers": {
            "x": (f32, 2, 32),
            "cos": (f32, 2, 16),
            "sin": (f32, 2, 16),
            "lengths": (i32, 2),
            "num_new": (i32, 2),
            **layers,
            **layers_results,
        },
        "kogpt_decode_steps": {
            "tokens": (i32, 2),
            "lengths": (i32, 2),
            "num_remaining": (i32, 2),
            "ignore_eos": (bool, 2),
            "embedding": (bf16, 24, 32),
            "cos": (f32, 32, 16),
            "sin": (f32, 32, 16),
            **layers,
            "result tokens": (i32, 2),
            "result lengths": (i32, 2),
            "result num_remaining": (i32, 2),
            "result new_tokens": (i32, 2, 4),
            "result logprobs": (f32, 2, 4),
            "result x": (f32, 2, 32),
            "result cos": (f32, 2, 16),
            "result sin": (f32, 2, 16),
            "result num_new": (i32, 2),
            "result candidates": (f32, 2, 1, 4),
            **layers_results,
        },
    }
    return {name: jnp.zeros(shape, dtype) for name, (dtype, *shape) in shapes[target].items()}


# Argument by result: what the result is aliased to.
ALIASES = {
    "kogpt_linear": {"semaphores": "result semaphores"},
    "kogpt_decode_attention": {name: f"result {name}" for name in ("act", "k_pages", "v_pages", "semaphores")},
    "kogpt_prefill_attention": {name: f"result {name}" for name in ("act", "k_pages", "v_pages")},
    "kogpt_decode_layers": {name: f"result {name}" for name in ("semaphores", "k_pages", "v_pages")},
    "kogpt_decode_steps": {
        name: f"result {name}" for name in ("tokens", "lengths", "num_remaining", "semaphores", "k_pages", "v_pages")
    },
}
_LAYERS_ATTRIBUTES: dict[str, Any] = {
    "epsilon": np.float32(1e-5),
    "prefetch_weights": False,
    "int8_activations": False,
    "devices": np.zeros(0, np.int64),
    "group_size": np.int64(1),
    "timeout_ms": np.int64(1000),
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "kogpt_linear": {
        "gelu_from": np.int64(16),
        "epsilon": np.float32(1e-5),
        "prefetch_weight": False,
        "done_mark": np.int64(0),
        "awaited_mark": np.int64(0),
        "early_from": np.int64(0),
        "int8_activations": False,
    },
    "kogpt_decode_attention": {"prefetch_cache": False, "leaves_room": False},
    "kogpt_prefill_attention": {"max_new": np.int64(70)},
    "kogpt_decode_layers": _LAYERS_ATTRIBUTES,
    "kogpt_decode_steps": {
        "vocab_size": np.int64(24),
        "eos_token_ids": np.array([7], np.int64),
        **_LAYERS_ATTRIBUTES,
    },
}
LAYERS_TARGETS = ["kogpt_decode_layers", "kogpt_decode_steps"]
TARGETS = ["kogpt_linear", "kogpt_decode_attention", *LAYERS_TARGETS]  # of both libraries


def make_int8_operands(target):
    """Of attention over INT8 pages."""
    operands = make_operands(target)
    for name in operands:
        if name.endswith("_pages"):
            operands[name] = operands[name].astype(jnp.int8)
        elif name.endswith("_scales"):
            operands[name] = jnp.ones((*operands["k_pages"].shape[:3], 1))
    return operands


# Of these a size in bytes is asked for.
SCRATCH_OF_LAYERS = ("result linear_partials", "result attention_partials", "result candidates")

# Of an aliased pair XLA checks that both are alike, so they are changed together, under the argument's name.
OPERANDS = [
    (target, name)
    for target in TARGETS
    for name in make_operands(target)
    if name not in ALIASES[target].values() and not (target in LAYERS_TARGETS and name in SCRATCH_OF_LAYERS)
]


def call(target, operands, *, without_alias=None, **attributes):
    """The FFI call without the op's own checks around it."""
    _library.register_targets()
    is_result = [name.startswith("result") for name in operands]
    names = list(operands)
    first_result = is_result.index(True)
    aliases = {
        names.index(argument): names.index(result) - first_result
        for argument, result in ALIASES[target].items()
        if argument != without_alias
    }
    results = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in list(operands.values())[first_result:]]
    function = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
    attributes = ATTRIBUTES[target] | attributes
    arguments = list(operands.values())[:first_result]
    return jax.block_until_ready(jax.jit(lambda *args: function(*args, **attributes))(*arguments))


def semaphores_of(target, operands):
    """What a call leaves of them."""
    names = [name for name in operands if name.startswith("result")]
    return call(target, operands)[names.index("result semaphores")]


def changed(target, name, change):
    operands = make_operands(target)
    for each in (name, ALIASES[target].get(name, name)):
        operands[each] = change(operands[each])
    return operands


def told_name(target, name):
    """An operand's name in errors: the layers' scales that come back are told by the name of those that go in."""
    return name.removeprefix("result ") if target in LAYERS_TARGETS and name.endswith("_scales") else name


def assert_refused(target, operands, *parts, **options):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call(target, operands, **options)
    for part in parts:
        assert part in str(caught.value)
    call(target, make_operands(target))  # the process lives, and so does the op


@pytest.mark.host
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_wrong(target):
    assert not semaphores_of(target, make_operands(target)).any()


@pytest.mark.host
@pytest.mark.parametrize(("target", "name"), OPERANDS)
def test_a_wrong_rank_is_refused(target, name):
    operands = changed(target, name, lambda value: value[None])
    told = told_name(target, name)
    assert_refused(target, operands, f"{target}: {told} must have ", str(list(operands[name].shape)))


@pytest.mark.host
@pytest.mark.parametrize(("target", "name"), OPERANDS)
def test_a_wrong_dtype_is_refused(target, name):
    operands = changed(target, name, lambda value: value.astype(jnp.uint16))
    assert_refused(target, operands, f"{target}: {told_name(target, name)} must have dtype ", "got type 7")


EXTENTS_OF_LAYERS = [
    ("page_table", 0, "page_table"),
    ("semaphores", 0, "semaphores"),
    ("lm_head", 0, "lm_head_bias"),
    ("lm_head", 1, "lm_head"),
    ("lm_head_bias", 0, "lm_head_bias"),
    ("ln_f_scale", 0, "ln_f_scale"),
    ("ln_f_bias", 0, "ln_f_bias"),
    ("ln_scale", 0, "ln_scale"),
    ("ln_bias", 0, "ln_bias"),
    ("w_in", 0, "b_ffn_in"),
    ("w_in", 1, "w_in"),
    ("b_ffn_in", 0, "b_ffn_in"),
    ("w_out", 0, "w_out"),
    ("w_out", 1, "w_out"),
    ("k_multiplier", 0, "k_multiplier"),
    ("b_ffn_out", 0, "b_ffn_out"),
    ("k_pages", 0, "v_pages"),
    ("k_pages", 2, "v_pages"),
    ("v_pages", 1, "v_pages"),
    ("v_pages", 3, "v_pages"),
    ("result y", 0, "result y"),
    ("result y", 1, "result y"),
    ("result logits", 0, "result logits"),
    ("result logits", 1, "result logits"),
    ("result other_x", 0, "result other_x"),
    ("result qkv", 1, "result qkv"),
    ("result act", 1, "result act"),
    ("result h", 1, "result h"),
    ("result part", 1, "result part"),
]


@pytest.mark.host
@pytest.mark.parametrize(
    ("target", "name", "axis", "blamed"),
    [
        # What decides the sizes is right by definition, and others do not fit it.
        ("kogpt_linear", "x", 0, "residual"),
        ("kogpt_linear", "x", 1, "weight"),
        ("kogpt_linear", "weight", 0, "weight_scale"),
        ("kogpt_linear", "weight", 1, "weight"),
        ("kogpt_linear", "weight_scale", 0, "weight_scale"),
        ("kogpt_linear", "bias", 0, "bias"),
        ("kogpt_linear", "ln_scale", 0, "ln_scale"),
        ("kogpt_linear", "ln_bias", 0, "ln_bias"),
        ("kogpt_linear", "k_multiplier", 0, "k_multiplier"),
        ("kogpt_linear", "residual", 0, "residual"),
        ("kogpt_linear", "residual", 1, "residual"),
        ("kogpt_linear", "semaphores", 0, "semaphores"),
        ("kogpt_linear", "result y", 0, "result y"),
        ("kogpt_linear", "result y", 1, "result y"),
        ("kogpt_linear", "result act", 0, "result act"),
        ("kogpt_linear", "result h", 0, "result h"),
        ("kogpt_linear", "result h", 1, "result h"),
        ("kogpt_decode_attention", "qkv", 0, "qkv"),
        ("kogpt_decode_attention", "qkv", 1, "qkv"),
        ("kogpt_decode_attention", "cos", 0, "cos"),
        ("kogpt_decode_attention", "cos", 1, "sin"),
        ("kogpt_decode_attention", "sin", 0, "sin"),
        ("kogpt_decode_attention", "k_pages", 0, "v_pages"),
        ("kogpt_decode_attention", "k_pages", 1, "qkv"),
        ("kogpt_decode_attention", "k_pages", 2, "v_pages"),
        ("kogpt_decode_attention", "k_pages", 3, "qkv"),
        ("kogpt_decode_attention", "v_pages", 3, "v_pages"),
        ("kogpt_decode_attention", "page_table", 0, "qkv"),
        ("kogpt_decode_attention", "lengths", 0, "lengths"),
        ("kogpt_decode_attention", "num_new", 0, "num_new"),
        ("kogpt_decode_attention", "act", 0, "act"),
        ("kogpt_decode_attention", "semaphores", 0, "semaphores"),
        ("kogpt_decode_layers", "x", 0, "cos"),
        ("kogpt_decode_layers", "x", 1, "ln_scale"),
        ("kogpt_decode_layers", "cos", 0, "cos"),
        ("kogpt_decode_layers", "cos", 1, "sin"),
        ("kogpt_decode_layers", "sin", 0, "sin"),
        ("kogpt_decode_layers", "lengths", 0, "lengths"),
        ("kogpt_decode_layers", "num_new", 0, "num_new"),
        ("kogpt_decode_steps", "tokens", 0, "lengths"),
        ("kogpt_decode_steps", "lengths", 0, "lengths"),
        ("kogpt_decode_steps", "num_remaining", 0, "num_remaining"),
        ("kogpt_decode_steps", "ignore_eos", 0, "ignore_eos"),
        ("kogpt_decode_steps", "embedding", 1, "result x"),
        ("kogpt_decode_steps", "cos", 0, "sin"),
        ("kogpt_decode_steps", "cos", 1, "sin"),
        ("kogpt_decode_steps", "sin", 0, "sin"),
        ("kogpt_decode_steps", "result new_tokens", 0, "result new_tokens"),
        ("kogpt_decode_steps", "result new_tokens", 1, "result logprobs"),
        ("kogpt_decode_steps", "result logprobs", 0, "result logprobs"),
        ("kogpt_decode_steps", "result logprobs", 1, "result logprobs"),
        ("kogpt_decode_steps", "result x", 0, "result x"),
        ("kogpt_decode_steps", "result x", 1, "result x"),
        ("kogpt_decode_steps", "result cos", 0, "result cos"),
        ("kogpt_decode_steps", "result sin", 1, "result sin"),
        ("kogpt_decode_steps", "result num_new", 0, "result num_new"),
        *((target, *extent) for target in LAYERS_TARGETS for extent in EXTENTS_OF_LAYERS),
    ],
)
def test_a_wrong_extent_is_refused(target, name, axis, blamed):
    operands = changed(target, name, lambda value: jnp.repeat(value, 2, axis))
    assert_refused(target, operands, f"{target}: {blamed} must have shape ", "got ")


@pytest.mark.host
@pytest.mark.parametrize("gelu_from", [-1, 25])
def test_gelu_from_beyond_the_outputs_is_refused(gelu_from):
    target = "kogpt_linear"
    assert_refused(target, make_operands(target), "gelu_from", "[0, 24]", str(gelu_from), gelu_from=np.int64(gelu_from))


@pytest.mark.host
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"done_mark": 2**31}, ["marks", "fit 32 bits", str(2**31)]),
        ({"done_mark": -1}, ["marks must not be negative"]),
        ({"awaited_mark": 1}, ["early columns belong to an x that neither LayerNorm nor a multiplier changes"]),
    ],
)
def test_marks_that_do_not_fit_are_refused(attributes, message):
    """Those that would wait for ever among them."""
    target = "kogpt_linear"
    assert_refused(target, make_operands(target), *message, **{k: np.int64(v) for k, v in attributes.items()})


@pytest.mark.host
def test_a_product_with_an_int8_weight_has_marks():
    """It tells one, and another one's early columns may be its x; 33 are not, of 32."""
    target = "kogpt_linear"
    call(target, make_operands(target), done_mark=np.int64(1))
    operands = make_operands(target) | {"x": jnp.zeros((2, 32), jnp.bfloat16)}
    for name in ("ln_scale", "ln_bias", "k_multiplier"):
        operands[name] = operands[name][:0]
    call(target, operands, awaited_mark=np.int64(1), early_from=np.int64(16), int8_activations=True)
    beyond = {"awaited_mark": np.int64(1), "early_from": np.int64(33)}
    assert_refused(target, operands, "early columns must begin in [0, K]", **beyond)


@pytest.mark.host
@pytest.mark.parametrize(("target", "name"), [(target, name) for target in TARGETS for name in ALIASES[target]])
def test_what_is_updated_in_place_must_be_aliased(target, name):
    assert_refused(target, make_operands(target), f"{target}: {name} must be aliased", without_alias=name)


INT8_ALIASES = {"k_scales": "result k_scales", "v_scales": "result v_scales"}


PARTS_OF_PAGES = ["k_pages", "k_scales", "v_pages", "v_scales"]


@pytest.mark.host
@pytest.mark.parametrize("name", PARTS_OF_PAGES)
@pytest.mark.parametrize("target", ["kogpt_decode_attention", *LAYERS_TARGETS])
def test_an_int8_cache_that_does_not_fit_is_refused(target, name, monkeypatch):
    operands = check_that_an_int8_cache_is_refused(target, name, monkeypatch)
    assert not semaphores_of(target, operands).any()


def check_that_an_int8_cache_is_refused(target, name, monkeypatch):
    """Where ``name`` does not fit; returns the operands of a call where all does, which still runs."""
    # Pages in bf16 have no scales.
    if name.endswith("_scales"):
        operands = make_operands(target)
        scales = {each: jnp.ones((*operands["k_pages"].shape[:3], 1)) for each in (name, f"result {name}")}
        got = list(scales[name].shape)
        assert_refused(target, operands | scales, f"{target}: {name} must have shape [0], got {got}")
    monkeypatch.setitem(ALIASES, target, ALIASES[target] | INT8_ALIASES)
    operands = make_int8_operands(target)
    call(target, operands)
    changes = {
        "must have dtype": lambda value: value.astype(jnp.int16),
        "must have ": lambda value: value[None],
        "must have shape": lambda value: jnp.repeat(value, 2, 3),
    }
    for message, change in changes.items():
        changed = {each: change(operands[each]) for each in (name, f"result {name}")}
        blamed = f"{name} {message}"
        if name == "k_pages" and message == "must have shape":  # k_pages say what head_dim is
            blamed = "w_in must have more outputs" if target in LAYERS_TARGETS else "qkv must have shape"
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: {blamed}"):
            call(target, operands | changed)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: {name} must be aliased"):
        call(target, operands, without_alias=name)
    call(target, operands)  # the process lives, and so does the op
    return operands


@pytest.mark.host
def test_sizes_that_fit_each_other_but_not_the_op_are_refused():
    rows = {"x": 80, "residual": 80, "result y": 80, "result act": 80, "result h": 80}
    operands = make_operands("kogpt_linear")
    operands |= {name: jnp.zeros((size, operands[name].shape[1]), operands[name].dtype) for name, size in rows.items()}
    assert_refused("kogpt_linear", operands, "kogpt_linear: ", "rows")


def without(operands, *names):
    return {name: value for name, value in operands.items() if name not in names}


@pytest.mark.host
@pytest.mark.parametrize("target", LAYERS_TARGETS)
@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["v_scales"], "19 and 14"),
        (["result v_scales"], "20 and 13"),
        (["k_scales", "v_scales", "result k_scales", "result v_scales"], "18 and 12"),
    ],
)
def test_layers_with_too_few_buffers_are_refused(target, names, numbers):
    message = f"{target}: layers must have 13 arrays and 4 results each, got {numbers}, with 7 and 10 in front"
    assert_refused(target, without(make_operands(target), *names), message)


@pytest.mark.host
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"result candidates": (2, 1, 2)},
            "result candidates must have 16 bytes for each slice of the vocabulary and row, got 16",
        ),
        ({"embedding": (25, 32)}, "lm_head must have a row for each of embedding's, 25, got 24"),
        (
            {"lm_head": (23, 32), "lm_head_bias": (23,), "result logits": (2, 23)},
            "lm_head must have a row for each of embedding's, 24, got 23",
        ),
        (
            dict.fromkeys(["lm_head", "lm_head_bias", "ln_f_scale", "ln_f_bias", "result logits"], (0,)),
            "lm_head must have a row for each of embedding's, 24, got 0",
        ),
        ({"cos": (0, 16), "sin": (0, 16)}, "there must be angles of 1 to 2^30 positions"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_steps_that_do_not_fit_their_layers_are_refused(shapes, message):
    target = "kogpt_decode_steps"
    operands = make_operands(target)
    operands |= {name: jnp.zeros(shape, operands[name].dtype) for name, shape in shapes.items()}
    assert_refused(target, operands, f"{target}: {message}")


@pytest.mark.host
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"vocab_size": np.int64(25)}, "vocab_size must be at most the 1 times 24 rows of embedding, got 25"),
        ({"vocab_size": np.int64(0)}, "there must be 1 to 2^30 tokens"),
        ({"eos_token_ids": np.zeros(17, np.int64)}, "eos_token_ids must hold at most 16, got 17"),
        ({"eos_token_ids": np.array([7, 2**31])}, "eos_token_ids must be in [0, 2^31), got 2147483648"),
        ({"eos_token_ids": np.array([-1])}, "eos_token_ids must be in [0, 2^31), got -1"),
    ],
    ids=str,
)
def test_attributes_of_steps_that_do_not_fit_are_refused(attributes, message):
    target = "kogpt_decode_steps"
    assert_refused(target, make_operands(target), f"{target}: {message}", **attributes)
