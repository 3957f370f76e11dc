"""Which of several ways to a product is the fastest on this device: measured once, kept in a file, then looked up.

`tune` times candidates and keeps those whose results are right. `tile_index` and `fastest_implementation` look up what
the files say, when a program is traced: they never time anything. What no file says is told once, and the choice by
shape serves.

A file holds what was measured on one model of device with one version of the kernels: the shipped ones lie in
``tuned/`` beside this module, the user's own in a folder that `set_user_folder` names, and its entries win. A file that
is broken, or was made on another device, with other kernels or in another format, is ignored with one line.
"""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import platform as host
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from custom_ops import _library, timing, tolerance

FORMAT_VERSION = 2

# For `tile`: the kernel chooses by the shape.
TILE_BY_SHAPE = -1

# Of programs whose results alone count: without the many ways to a product that XLA on GPUs would compile and time.
_AS_IT_COMES: Any = {"xla_gpu_enable_triton_gemm": False}
_SAMPLE_S = 0.2  # what a sample may take by the reference's time, if that is two calls at least

_SHIPPED_FOLDER = pathlib.Path(__file__).with_name("tuned")
_CPU_INFO = pathlib.Path("/proc/cpuinfo")

_logger = logging.getLogger("custom_ops")
_user_folder: pathlib.Path | None = None
_told: set[tuple[str, int]] = set()


# -- What is measured -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    """A product, rows [T, K] by a weight [M, K]; ``rows`` stands for all T from half of it, exclusive, up to it."""

    op: str  # "int8_gemm", "mixed_gemm"
    dtype: str  # of what is beside INT8, as NumPy names it
    num_outputs: int
    k_dim: int
    rows: int  # a power of two

    @classmethod
    def of(cls, op: str, dtype: Any, num_outputs: int, k_dim: int, rows: int) -> "Key":
        """The key of a product with any number of rows, 1 or more."""
        return cls(op, np.dtype(dtype).name, num_outputs, k_dim, 1 << (rows - 1).bit_length())

    def __post_init__(self) -> None:
        sizes = (self.num_outputs, self.k_dim, self.rows)
        if not (isinstance(self.op, str) and isinstance(self.dtype, str)):
            raise ValueError(f"op and dtype must be names, got {self.op!r} and {self.dtype!r}")
        if any(type(size) is not int or size < 1 for size in sizes) or self.rows & (self.rows - 1):
            raise ValueError(f"sizes must be positive integers, rows a power of two, got {sizes}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to a product."""

    implementation: str  # "reference", "ffi", "linear"
    tile: str | None = None  # of "ffi", a name of the library's; None: chosen by the shape

    def __post_init__(self) -> None:
        if not (isinstance(self.implementation, str) and isinstance(self.tile, str | None)):
            raise ValueError(f"implementation and tile must be names, got {self.implementation!r} and {self.tile!r}")

    def __str__(self) -> str:
        return " ".join(filter(None, (self.implementation, self.tile)))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of a call."""

    choice: Choice
    us: float

    def __post_init__(self) -> None:
        if not (isinstance(self.us, int | float) and math.isfinite(self.us) and self.us > 0):
            raise ValueError(f"us must be a positive number, got {self.us!r}")


Table = Mapping[Key, tuple[Timing, ...]]  # the fastest first


@dataclasses.dataclass(frozen=True)
class Device:
    """What times count for: a model of device, and the kernels that were timed, whatever compiled them: a file changes
    no result."""

    name: str
    gemm_hash: str


def find_device(platform: str) -> Device | None:
    """The device that JAX's "cpu" or "gpu" is on this machine, or None if it, or its library, is not there."""
    library = _library.load(platform)
    if library.problem or library.gemm_hash is None:
        return None
    try:
        name = _cpu_name() if platform == "cpu" else jax.devices(platform)[0].device_kind
    except RuntimeError:  # there are GPUs, but not for JAX
        return None
    return Device(name, library.gemm_hash)


@functools.cache
def _cpu_name() -> str:
    """JAX calls every CPU "cpu"."""
    try:
        found = re.search(r"^model name\s*: (.+)$", _CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return f"{found[1].strip() if found else host.machine()}, {os.cpu_count()} cores"


# -- Looking up -------------------------------------------------------------------------------------------------------


def set_user_folder(folder: pathlib.Path | None) -> None:
    """Where the user's own files are, and where `save` writes them. It need not exist."""
    global _user_folder
    _user_folder = folder


def tile_index(op: str, dtype: Any, num_outputs: int, k_dim: int, rows: int) -> int:
    """Which of the library's tiles is the fastest on this machine's GPU; `TILE_BY_SHAPE` if no file says.

    Args:
        op: "int8_gemm" or "mixed_gemm".
        dtype: of the result.
        num_outputs: M.
        k_dim: K.
        rows: T.
    """
    names = _library.load("gpu").tiles.get(op, ())
    if len(names) < 2:
        return TILE_BY_SHAPE
    key = Key.of(op, dtype, num_outputs, k_dim, rows)
    for entry in load_table("gpu").get(key, ()):
        if entry.choice.tile in names:
            return names.index(entry.choice.tile)
    _tell_once(op, key.rows, f"up to {key.rows} rows, {num_outputs} outputs, K {k_dim}, {key.dtype}")
    return TILE_BY_SHAPE


def fastest_implementation(
    platform: str, op: str, dtype: Any, shapes: Sequence[tuple[int, int]], usable: Collection[str], *, above: int = 0
) -> str | None:
    """The implementation that serves a model's products best over all the rows that were measured, or None if nothing
    was.

    One for all rows, lest a row's result depend on how many others there are. Each number of rows counts alike,
    whatever it takes: an implementation's time for the products together is compared with the fastest one's.

    Args:
        platform: "cpu" or "gpu".
        op: "int8_gemm" or "mixed_gemm".
        dtype: of the result.
        shapes: (M, K) of each product.
        usable: the implementations to choose from.
        above: up to so many rows something else serves, and they do not count.
    """
    table = load_table(platform)
    keys = [key for key in table if (key.op, key.dtype) == (op, np.dtype(dtype).name)]
    slowdowns: dict[str, list[float]] = {implementation: [] for implementation in usable}
    for rows in sorted({key.rows for key in keys if key.rows > above}):
        entries = [table.get(Key.of(op, dtype, *shape, rows), ()) for shape in shapes]
        totals = {name: sum(_fastest_us(entry, name) for entry in entries) for name in usable}
        best = min(totals.values())
        if math.isfinite(best):  # else it was measured for another model
            for name, total in totals.items():
                slowdowns[name].append(total / best)
    means = {name: statistics.fmean(values) for name, values in slowdowns.items() if values}
    if means:
        return min(means, key=means.__getitem__)
    if platform == "gpu" and find_device(platform) is not None:
        products = " and ".join(f"{num_outputs} outputs, K {k_dim}" for num_outputs, k_dim in shapes)
        _tell_once(op, 0, f"{products}, {np.dtype(dtype).name}")
    return None


def _fastest_us(entry: Sequence[Timing], implementation: str) -> float:
    return min((timed.us for timed in entry if timed.choice.implementation == implementation), default=math.inf)


def _tell_once(op: str, rows: int, what: str) -> None:
    """Once an op and a number of rows, 0 for all."""
    if (op, rows) not in _told:
        _told.add((op, rows))
        _logger.warning(
            "%s has not been timed on this device for %s: a built-in rule chooses (kogpt autotune measures it)",
            op,
            what,
        )


# -- Files ------------------------------------------------------------------------------------------------------------


def load_table(platform: str) -> Table:
    """What is known of this machine's device; read once. Empty if there is none."""
    device = find_device(platform)
    return {} if device is None else _load_table(device, _user_folder)


@functools.cache
def _load_table(device: Device, user_folder: pathlib.Path | None) -> Table:
    folders = [_SHIPPED_FOLDER] + ([] if user_folder is None else [user_folder])
    tables = [read_table(folder / file_name(device), device) for folder in folders]
    return functools.reduce(lambda shipped, own: {**shipped, **own}, tables)


def file_name(device: Device) -> str:
    """``"nvidia-h100-80gb-hbm3.json"``."""
    return re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-") + ".json"


def read_table(path: pathlib.Path, device: Device) -> Table:
    """What a file says of the device; nothing if it is not there, or cannot be used, which one line then says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = _head(device)
        head = {name: content.get(name) for name in expected}
        for name, value in expected.items():
            if head[name] != value:
                raise ValueError(f"its {name} is {head[name]!r}, not {value!r}")
        return dict(map(_parse_entry, content["entries"]))
    except FileNotFoundError:
        return {}
    except KeyError as error:
        problem = f"it has no {error}"
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        problem = " ".join(str(error).split())
    _logger.warning("times of products in %s are ignored: %s", path, problem)
    return {}


def save(device: Device, entries: Table) -> pathlib.Path:
    """Adds entries to the user's file of a device, in place of older ones, and returns its path.

    The file is whole at any time. Without entries nothing is written but for a try.

    Raises:
        OSError: the file system refuses.
        ValueError: no user folder was set.
    """
    if _user_folder is None:
        raise ValueError("set_user_folder must come before save")
    path = _user_folder / file_name(device)
    if not entries:  # only whether it could be written: what another library has measured stays
        _user_folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=_user_folder).close()
        return path
    table = {**read_table(path, device), **entries}
    records = [
        {
            **dataclasses.asdict(key),
            "candidates": [{**dataclasses.asdict(timed.choice), "us": timed.us} for timed in timings],
        }
        for key, timings in sorted(table.items(), key=lambda item: dataclasses.astuple(item[0]))
    ]
    content = {**_head(device), "made_with": _made_with(), "entries": records}
    _user_folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=_user_folder)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.chmod(temporary, 0o644)  # mkstemp's are closed to others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _load_table.cache_clear()
    return path


def _made_with() -> dict[str, Any]:
    """For whoever reads the file."""
    libraries = [info for info in _library.library_info() if info.problem is None]
    of_library = ("version", "compilers", "architectures", "source_hash")
    return {"jax": jax.__version__, **{i.name: {name: getattr(i, name) for name in of_library} for i in libraries}}


def _head(device: Device) -> dict[str, Any]:
    """What a file must say to be for this device and its kernels."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(device)}


def _parse_entry(record: Mapping[str, Any]) -> tuple[Key, tuple[Timing, ...]]:
    key = Key(**{field.name: record[field.name] for field in dataclasses.fields(Key)})
    timings = [
        Timing(Choice(candidate["implementation"], candidate["tile"]), candidate["us"])
        for candidate in record["candidates"]
    ]
    return key, tuple(sorted(timings, key=lambda timed: timed.us))


# -- Measuring --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to a product: a number from the call before, as `timing.Step` has it, and operands -> (y, act)."""

    choice: Choice
    run: Callable[[Array, Any], tuple[Array, Array | None]]
    # operands -> operands as the way rounds them beforehand, in f32, where the op's reference does not.
    rounded: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `tune` found."""

    timings: tuple[Timing, ...]  # of the candidates whose results are right, the fastest first
    rejected: tuple[tuple[Choice, str], ...]  # the others, and why

    def us(self, choice: Choice) -> float | None:
        """What a candidate took; None if it was rejected, or not there."""
        return next((timed.us for timed in self.timings if timed.choice == choice), None)


def tune(
    candidates: Sequence[Candidate],
    operands: Sequence[Any],
    *,
    reference: Callable[[Any], tuple[Array, Array | None]],
    oracle: Callable[[Any], tuple[Array, Array | None]],
    num_gelu: int = 0,
    tensor_core_k: int = 0,
    turns: int = 5,
    rounds: int = 5,
) -> Outcome:
    """Times candidates, one after the other in each round, and keeps those that are right.

    Right: a result's error against the oracle is within `tolerance.allowed_error` of the reference's own, or of what
    the candidate rounds beforehand if that is more.

    Args:
        candidates: the ways to the product.
        operands: of a call each, to rotate over: so many weights that a cache does not hold them, or as many as a model
            has. Arguments of the programs, which a constant that is as large would slow down.
        reference: the op's reference in the same precision: operands -> (y, act).
        oracle: the same in f32.
        num_gelu: columns of act that are GELU's; those in front of them are not compared.
        tensor_core_k: products of an output that tensor cores sum in f32 (`tolerance.allowed_error`).
        turns: rotations of a sample; fewer, and over fewer operands, where the reference is slow.
        rounds: samples of a candidate; their median counts. Each begins with another candidate.
    """
    defined = functools.partial(_defined, num_gelu=num_gelu)
    run_oracle = jax.jit(oracle, compiler_options=_AS_IT_COMES)
    run_reference = jax.jit(reference, compiler_options=_AS_IT_COMES)
    expected = defined(run_oracle(operands[0]))
    plain = defined(run_reference(operands[0]))
    own_errors = [_error(got, wanted) for got, wanted in zip(plain, expected, strict=True)]

    def allowed(candidate: Candidate) -> list[float]:
        errors = own_errors
        if candidate.rounded is not None:
            rounded = defined(run_oracle(candidate.rounded(operands[0])))
            errors = [max(own, _error(*pair)) for own, *pair in zip(own_errors, rounded, expected, strict=True)]
        return [
            tolerance.allowed_error(error, got.dtype, tensor_core_k=tensor_core_k)
            for error, got in zip(errors, plain, strict=True)
        ]

    begin = time.perf_counter()
    jax.block_until_ready(run_reference(operands[0]))
    calls = int(_SAMPLE_S / (time.perf_counter() - begin))  # that a sample has room for
    operands = operands[: max(2, calls)]  # a call that is so slow leaves nothing in a cache anyway
    turns = max(1, min(turns, calls // len(operands)))
    # Most of the time is XLA's, which compiles on as many cores as there are; nothing runs beside what is timed.
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        rotations = [
            pool.submit(timing.compile_rotation, _step(candidate), operands, turns=turns) for candidate in candidates
        ]
        concurrent.futures.wait(rotations)
    finally:  # Ctrl-C waits for what is being compiled, not for the rest
        pool.shutdown(cancel_futures=True)
    rejected: list[tuple[Choice, str]] = []
    right: dict[Choice, timing.Rotation] = {}
    for candidate, compiled in zip(candidates, rotations, strict=True):
        try:
            rotation = compiled.result()
            problem = _problem(defined(rotation.results()), expected, allowed(candidate))
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:  # such as too little memory
            problem = str(error).splitlines()[0]
        if problem is None:
            right[candidate.choice] = rotation
        else:
            rejected.append((candidate.choice, problem))
    samples: dict[Choice, list[float]] = {choice: [] for choice in right}
    for number in range(rounds):
        # Another begins each time: the first meets the coolest device, and looked 4 % faster on an H100.
        order = list(right)
        shift = number * len(order) // rounds
        for choice in order[shift:] + order[:shift]:
            samples[choice].append(right[choice].sample())
    timings = [Timing(choice, round(statistics.median(times), 3)) for choice, times in samples.items()]
    return Outcome(tuple(sorted(timings, key=lambda timed: timed.us)), tuple(rejected))


def _step(candidate: Candidate) -> timing.Step:
    def step(before: Array, operands: Any) -> tuple[Array, Any]:
        return timing.with_next(*candidate.run(before, operands))

    return step


def _defined(results: tuple[Array, Array | None], *, num_gelu: int) -> list[Array]:
    y, act = results
    return [y] if act is None else [y, act[:, act.shape[1] - num_gelu :]]


def _error(actual: Array, expected: Array) -> float:
    return float(tolerance.relative_error(actual, expected))


def _problem(results: Sequence[Array], expected: Sequence[Array], allowed: Sequence[float]) -> str | None:
    """Why results are not right, or None if they are."""
    for got, wanted, limit in zip(results, expected, allowed, strict=True):
        if got.shape != wanted.shape:
            return f"shape {got.shape} instead of {wanted.shape}"
        error = _error(got, wanted)
        if not (error <= limit):
            return f"error {error:.3g}, allowed {limit:.3g}"
    return None
