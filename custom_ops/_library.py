"""The compiled libraries: finds them, checks that they fit the running jaxlib, and registers their FFI targets.

All of it happens at the first question or the first op, never at import.
"""

import ctypes
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jaxlib

# FFI target and C symbol of its handler: those of both libraries, those that the CUDA library has besides, and those
# that it has if it was built with CUTLASS's headers.
_TARGETS = {
    "kogpt_linear": "Linear",
    "kogpt_decode_attention": "DecodeAttention",
    "kogpt_decode_layers": "DecodeLayers",
    "kogpt_decode_steps": "DecodeSteps",
}
_CUDA_TARGETS = {
    "kogpt_all_reduce": "AllReduce",
    "kogpt_prefill_attention": "PrefillAttention",
}
_GEMM_TARGETS = {
    "kogpt_int8_gemm": "Int8Gemm",
    "kogpt_mixed_gemm": "MixedGemm",
    "kogpt_quantize_rows": "QuantizeRows",
}
# For each of JAX's platforms that has a library: its name, and the platform of XLA that its targets are registered for.
_LIBRARIES = {"cpu": ("host", "cpu"), "gpu": ("cuda", "CUDA")}

_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class LibraryInfo:
    """What is known of a compiled library."""

    name: str  # "host" or "cuda"
    path: str | None = None  # None: it was not built
    ffi_version: tuple[int, int] | None = None  # XLA's FFI, as compiled against
    architectures: tuple[str, ...] = ()  # CUDA: such as "sm_90a", or "compute_80" for PTX
    compilers: tuple[str, ...] = ()
    problem: str | None = "there is none for this kind of device"  # why it cannot be used; None: it can
    left_out: tuple[str, ...] = ()  # targets that it was built without
    version: str | None = None  # of the package that it was compiled from
    source_hash: str | None = None  # a digest of its kernels' sources, compilers and architectures
    gemm_hash: str | None = None  # CUDA: of the sources of products of many rows; else that of all
    instruction_set: str | None = None  # Host: what its code is chosen for here, "portable", "avx2" or "avx512"
    # CUDA: how its products of many rows can be cut on this machine's GPU, by op; `tile` is an index of the names.
    tiles: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def library_info() -> tuple[LibraryInfo, ...]:
    """The Host library and the CUDA library: where they are, how they were built, and whether they can be used."""
    return tuple(map(load, _LIBRARIES))


def register_targets() -> None:
    """Registers the targets of every library that can be used. Only the first call of a process does anything.

    Raises:
        ValueError: there is none.
    """
    libraries = library_info()
    if all(library.problem for library in libraries):
        problems = "; ".join(f"the {library.name} library: {library.problem}" for library in libraries)
        raise ValueError(f'implementation "ffi" has no library to run: {problems}')


def load(platform: str) -> LibraryInfo:
    """Loads the library for a platform of JAX's ("cpu", "gpu") and registers its targets, unless it has a `problem`."""
    with _lock:
        return _load(platform)


@functools.cache
def _load(platform: str) -> LibraryInfo:
    if platform not in _LIBRARIES:
        return LibraryInfo(platform)
    name, xla_platform = _LIBRARIES[platform]
    path = _find(f"libkogpt_ops_{name}.so")
    if path is None:
        return LibraryInfo(name, problem="it was not built")
    try:
        library = ctypes.CDLL(str(path))
        info = _read_info(name, path, library)
        if info.problem is None:
            # All before the first is registered: what lacks one is not of this version of the package.
            targets = _TARGETS
            if name == "cuda":
                targets = targets | _CUDA_TARGETS
                if any(hasattr(library, symbol) for symbol in _GEMM_TARGETS.values()):
                    targets = targets | _GEMM_TARGETS
                else:
                    info = dataclasses.replace(info, left_out=tuple(_GEMM_TARGETS))
            handlers = {target: getattr(library, symbol) for target, symbol in targets.items()}
            for target, handler in handlers.items():
                capsule = jax.ffi.pycapsule(handler)
                jax.ffi.register_ffi_target(target, capsule, platform=xla_platform, api_version=1)
        return info
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return LibraryInfo(name, str(path), problem=f"it cannot be loaded: {error}")


def cuda_function(name: str, *argument_types: Any) -> Callable[..., str | None]:
    """A function of the CUDA library, which must be one that can be used: it returns None or what went wrong."""
    function = getattr(ctypes.CDLL(load("gpu").path), name)
    function.argtypes = argument_types
    function.restype = ctypes.c_char_p

    def call(*arguments: Any) -> str | None:
        message = function(*arguments)
        return None if message is None else message.decode()

    return call


def jaxlib_ffi_version() -> tuple[int, int] | None:
    """The version of XLA's FFI in the running jaxlib: its own headers say it. None if they are not there."""
    header = pathlib.Path(next(iter(jaxlib.__path__)), "include", "xla", "ffi", "api", "c_api.h")
    try:
        text = header.read_text(encoding="utf-8")
    except OSError:
        return None
    found = [re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.MULTILINE) for part in ("MAJOR", "MINOR")]
    major, minor = (None if match is None else int(match[1]) for match in found)
    return None if major is None or minor is None else (major, minor)


def ffi_version_problem(library: tuple[int, int], jaxlib_version: tuple[int, int] | None) -> str | None:
    """Why a library compiled against one version of XLA's FFI cannot run in a jaxlib with another. None: it can.

    A library runs in jaxlib's of its own version and of later minor ones. Registered in an earlier one, it would end
    JAX's backend.
    """
    if jaxlib_version is None:
        return "the version of XLA's FFI in the running jaxlib cannot be read"
    if library[0] == jaxlib_version[0] and library[1] <= jaxlib_version[1]:
        return None
    return (
        f"it was compiled against version {_dotted(library)} of XLA's FFI, and jaxlib "
        f"{importlib.metadata.version('jaxlib')} has {_dotted(jaxlib_version)}: build it anew, or take a newer jaxlib"
    )


def cuda_problem(
    driver_version: int, runtime_version: int, compute_capability: int, architectures: tuple[str, ...]
) -> str | None:
    """Why a CUDA library cannot run on this machine. None: it can.

    Args:
        driver_version: the newest CUDA that the driver knows, as ``CUDART_VERSION`` has it; 0: no driver.
        runtime_version: CUDA of the library, likewise.
        compute_capability: the lowest of the GPUs, 90 for 9.0; 0: no GPU.
        architectures: as `LibraryInfo` has them.
    """
    if driver_version == 0 or compute_capability == 0:
        return "this machine has no NVIDIA GPU, or no driver for it"
    if driver_version // 1000 < runtime_version // 1000:
        return (
            f"it needs a driver for CUDA {runtime_version // 1000}, and this machine's knows {driver_version // 1000}"
        )
    if not any(_runs(architecture, compute_capability) for architecture in architectures):
        return (
            f"it is compiled for {', '.join(architectures)}, and a GPU of this machine has compute capability "
            f"{compute_capability // 10}.{compute_capability % 10}"
        )
    return None


def _runs(architecture: str, compute_capability: int) -> bool:
    kind, _, number = architecture.partition("_")
    if not number.isdigit():  # such as 90a: for this one capability
        return number.rstrip("af") == str(compute_capability)
    is_same_major = int(number) // 10 == compute_capability // 10
    return int(number) <= compute_capability and (kind == "compute" or is_same_major)


def _find(file_name: str) -> pathlib.Path | None:
    """The library beside this package's sources or, of an editable install, in site-packages. A development tree may
    have both: the newer one counts."""
    folders = map(pathlib.Path, sys.modules[__name__.rpartition(".")[0]].__path__)
    found = [path for folder in folders if (path := folder / file_name).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _read_info(name: str, path: pathlib.Path, library: ctypes.CDLL) -> LibraryInfo:
    major, minor = ctypes.c_int32(), ctypes.c_int32()
    library.KogptOpsFfiVersion(ctypes.byref(major), ctypes.byref(minor))
    ffi_version = (major.value, minor.value)
    problem = ffi_version_problem(ffi_version, jaxlib_ffi_version())
    tiles = {}
    cmake_names = _strings(library, "KogptOpsCudaArchitectures")
    architectures = tuple(name for cmake_name in cmake_names for name in _architecture_names(cmake_name))
    if name == "cuda" and problem is None:
        driver, runtime, capability = ctypes.c_int32(), ctypes.c_int32(), ctypes.c_int32()
        library.KogptOpsCudaMachine(ctypes.byref(driver), ctypes.byref(runtime), ctypes.byref(capability))
        problem = cuda_problem(driver.value, runtime.value, capability.value, architectures)
        if problem is None and hasattr(library, "KogptOpsGemmTiles"):
            tiles = {
                op: _strings(library, "KogptOpsGemmTiles", op.encode(), ctypes.c_int32(capability.value))
                for op in ("int8_gemm", "mixed_gemm")
            }
    return LibraryInfo(
        name,
        str(path),
        ffi_version,
        architectures,
        _strings(library, "KogptOpsCompilers"),
        problem,
        version=_strings(library, "KogptOpsVersion")[0],
        source_hash=_strings(library, "KogptOpsSourceHash")[0],
        gemm_hash=_strings(library, "KogptOpsGemmHash")[0],
        instruction_set=_strings(library, "KogptOpsHostIsa")[0] if name == "host" else None,
        tiles=tiles,
    )


def _strings(library: ctypes.CDLL, function_name: str, *arguments: Any) -> tuple[str, ...]:
    function = getattr(library, function_name)
    function.restype = ctypes.c_char_p
    return tuple(filter(None, function(*arguments).decode().split(",")))


def _architecture_names(cmake_name: str) -> tuple[str, ...]:
    """In CMake "90a-real" is code for sm_90a, "80-virtual" PTX for compute_80, "80" both."""
    number, _, kind = cmake_name.partition("-")
    names = {"real": f"sm_{number}", "virtual": f"compute_{number}"}
    return (names[kind],) if kind else tuple(names.values())


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
