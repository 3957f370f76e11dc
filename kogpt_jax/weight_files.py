"""Weight files in Hugging Face layout, whatever the model: found, opened, read ahead, and written whole or not at all.

Knows keys only as strings; which ones a model has is `checkpoint.py`'s business.
"""

import abc
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from kogpt_jax.config import NUMPY_DTYPES
from kogpt_jax.errors import InputError, one_line
from kogpt_jax.json_files import read_json_object, write_json

# Large enough for the disk, small enough that a block is checked and copied while it is in the CPU's cache. Two readers
# keep the disk busy while one block is copied; the buffers are all that a load keeps on the host beside the arrays.
BLOCK_BYTES = 4 << 20
_NUM_READERS = 2
_NUM_BUFFERS = 8

_SAFETENSORS = "model.safetensors"
_SAFETENSORS_SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
_TORCH_BIN = "pytorch_model.bin"
_INDEX_SUFFIX = ".index.json"
_SUFFIXES = (".safetensors", ".bin")

# What tensors are stored in: the dtypes of models, and what quantised weights are in.
STORED_DTYPES = NUMPY_DTYPES | {"int8": np.dtype(np.int8)}
# Our names as the files spell them.
_DTYPE_OF_SAFETENSORS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8"}
_DTYPE_OF_TORCH = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}


class WeightFile(abc.ABC):
    """An open weight file."""

    path: pathlib.Path
    tensors: dict[str, "StoredTensor"]

    @abc.abstractmethod
    def read_rows(self, stored: "StoredTensor", rows: slice, out: np.ndarray) -> None:
        """Fills ``out`` (contiguous, of the stored dtype) with these rows; safe to call from several threads.

        Raises:
            InputError: the file cannot be read, or ends early.
        """


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    file: WeightFile
    key: str
    dtype: str  # one of STORED_DTYPES, or what the file calls a dtype that we do not take
    shape: tuple[int, ...]
    position: int  # orders the tensors of a file as they lie on the disk

    @property
    def row_bytes(self) -> int:
        return STORED_DTYPES[self.dtype].itemsize * math.prod(self.shape[1:])


class _SafetensorsFile(WeightFile):
    """A ``.safetensors`` file: header checked by the library, tensors read by position.

    Plain reads into buffers that are used again, not the library's memory map: page faults read the disk in small steps
    one after another, and the library gives each tensor as a fresh copy.
    """

    def __init__(self, path: pathlib.Path, closing: contextlib.ExitStack):
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass  # opening checks that header, offsets and file size agree
            self._fd = os.open(path, os.O_RDONLY)
            closing.callback(os.close, self._fd)
            header_bytes = int.from_bytes(os.pread(self._fd, 8, 0), "little")
            header = json.loads(os.pread(self._fd, header_bytes, 8))
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a complete safetensors file: {one_line(error)}") from error
        for key, entry in header.items():
            if key != "__metadata__":
                dtype = _DTYPE_OF_SAFETENSORS.get(entry["dtype"], entry["dtype"])
                position = 8 + header_bytes + entry["data_offsets"][0]
                self.tensors[key] = StoredTensor(self, key, dtype, tuple(entry["shape"]), position)

    def read_rows(self, stored: StoredTensor, rows: slice, out: np.ndarray) -> None:
        view = out.reshape(-1).view(np.uint8).data
        position = stored.position + rows.start * stored.row_bytes
        while view:
            try:
                count = os.preadv(self._fd, [view], position)
            except OSError as error:
                raise InputError(f"{self.path}: {stored.key} cannot be read: {one_line(error)}") from error
            if count == 0:
                raise InputError(f"{self.path}: {stored.key} ends early: the file became shorter while it was read")
            view = view[count:]
            position += count


class _TorchFile(WeightFile):
    """A ``pytorch_model*.bin`` file, memory-mapped; only tensors are unpickled, never code."""

    def __init__(self, path: pathlib.Path):
        try:
            import torch
        except ImportError as error:
            raise InputError(f"{path} needs PyTorch to be read: pip install kogpt-jax[torch]") from error
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        try:
            loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file raises whatever the unpickler or the zip reader met
            raise InputError(f"{path} is not a complete file of torch.save: {one_line(error)}") from error
        if not isinstance(loaded, Mapping):
            raise InputError(f"{path} must hold a mapping of keys to tensors, got {type(loaded).__name__}")
        self._loaded = loaded
        for key, tensor in loaded.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                raise InputError(f"{path}: {key} must be a dense tensor, got {type(tensor).__name__}")
            dtype = _DTYPE_OF_TORCH.get(str(tensor.dtype), str(tensor.dtype))
            self.tensors[key] = StoredTensor(self, key, dtype, tuple(tensor.shape), tensor.data_ptr())

    def read_rows(self, stored: StoredTensor, rows: slice, out: np.ndarray) -> None:
        import torch

        tensor = self._loaded[stored.key].detach()[rows]
        if stored.dtype == "bf16":  # torch hands no bfloat16 to NumPy
            out[...] = tensor.view(torch.int16).numpy().view(out.dtype)
        else:
            out[...] = tensor.numpy()


def open_tensors(directory: pathlib.Path, closing: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens a model directory's weight files: key -> stored tensor, in the order of the disk.

    Looks for Hugging Face's four layouts in transformers' order: safetensors before torch, one file before an index.

    Raises:
        InputError: no weights, a missing or damaged file, a directory or dead link in a file's place, a key in two
            files, or an index that does not fit its files.
    """
    if not directory.is_dir():
        raise InputError(f"model directory does not exist: {directory}")
    for name in (_SAFETENSORS, _TORCH_BIN):
        file, index = directory / name, directory / f"{name}{_INDEX_SUFFIX}"
        if _is_there(file):
            return _in_disk_order(_open_file(file, closing).tensors)
        if _is_there(index):
            return _open_indexed(index, closing)
    raise InputError(f"no {_SAFETENSORS}, {_TORCH_BIN} or index of either in {directory}")


def find_weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Files of a directory that hold or index weights, by name.

    Raises:
        InputError: the directory does not exist or cannot be read.
    """
    try:
        files = [path for path in sorted(directory.iterdir()) if path.is_file()]
    except OSError as error:
        raise InputError(f"model directory {directory} cannot be read: {one_line(error)}") from error
    return [path for path in files if path.suffix in _SUFFIXES or path.name.endswith(_INDEX_SUFFIX)]


def _is_there(path: pathlib.Path) -> bool:
    """Whether a file has this name; what has it and is no file is refused, not passed over for the next layout."""
    if path.is_file():
        return True
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if path.exists():
        raise InputError(f"{path} is not a file")
    return False


def _open_indexed(index: pathlib.Path, closing: contextlib.ExitStack) -> dict[str, StoredTensor]:
    weight_map = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        for key, stored in _in_disk_order(_open_file(path, closing).tensors).items():
            if key in tensors:
                raise InputError(f"{path}: key {key!r} is also in {tensors[key].file.path}")
            if key not in weight_map:
                raise InputError(f"{path}: key {key!r} is not in {index}")
            tensors[key] = stored
    for key, name in weight_map.items():
        if key not in tensors or tensors[key].file.path.name != name:
            raise InputError(f"{index}: key {key!r} is not in {name}")
    return tensors


def _in_disk_order(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return dict(sorted(tensors.items(), key=lambda item: item[1].position))


def _open_file(path: pathlib.Path, closing: contextlib.ExitStack) -> WeightFile:
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    return _SafetensorsFile(path, closing) if path.suffix == ".safetensors" else _TorchFile(path)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """The ``weight_map`` of an index: key -> name of a file that exists beside the index."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{path} has no weight_map")
    for key, name in weight_map.items():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise InputError(f"{path}: key {key!r} must name a file beside the index, got {name!r}")
        if pathlib.PurePath(name).suffix not in _SUFFIXES:
            raise InputError(f"{path}: key {key!r} names {name}, expected a file that ends in {' or '.join(_SUFFIXES)}")
        if not (path.parent / name).is_file():
            raise InputError(f"{path}: key {key!r} names {name}, which is missing")
    return weight_map


# -- Reading ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of a stored tensor, few enough to be read in one piece."""

    stored: StoredTensor
    rows: slice

    @property
    def num_bytes(self) -> int:
        return (self.rows.stop - self.rows.start) * self.stored.row_bytes


def split_rows(stored: StoredTensor, start: int, stop: int) -> Iterator[Block]:
    """The rows from ``start`` to ``stop`` as blocks."""
    rows_per_block = max(1, BLOCK_BYTES // stored.row_bytes)
    for first in range(start, stop, rows_per_block):
        yield Block(stored, slice(first, min(first + rows_per_block, stop)))


def read_ahead(blocks: Sequence[Block]) -> Generator[tuple[Block, np.ndarray]]:
    """Yields blocks and their values in order, while threads read and check the next ones.

    Values are good until the next block is asked for: their buffer is then used again.

    Raises:
        InputError: a file cannot be read, or a value is NaN or infinite.
    """
    free = [np.empty(max(block.num_bytes for block in blocks), np.uint8) for _ in range(_NUM_BUFFERS)]
    pending: collections.deque[tuple[Block, np.ndarray, concurrent.futures.Future[np.ndarray]]] = collections.deque()
    remaining = iter(blocks)
    pool = concurrent.futures.ThreadPoolExecutor(_NUM_READERS)
    try:
        while True:
            while free and (block := next(remaining, None)) is not None:
                buffer = free.pop()
                pending.append((block, buffer, pool.submit(_read_block, block, buffer)))
            if not pending:
                return
            block, buffer, values = pending.popleft()
            yield block, values.result()
            free.append(buffer)
    finally:
        pool.shutdown(cancel_futures=True)


def _read_block(block: Block, buffer: np.ndarray) -> np.ndarray:
    stored, rows = block.stored, block.rows
    values = buffer[: block.num_bytes].view(STORED_DTYPES[stored.dtype])
    values = values.reshape(rows.stop - rows.start, *stored.shape[1:])
    stored.file.read_rows(stored, rows, values)
    if stored.dtype != "int8" and not _is_finite(values):
        raise InputError(f"{stored.file.path}: {stored.key} holds values that are NaN or infinite")
    return values


def _is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; on the bits, which is four times as fast as NumPy's test of 16-bit floats.

    Without its sign bit a float is at least infinity's bits exactly if it is infinite or NaN.
    """
    bits = np.dtype(f"u{values.dtype.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(bits)
    magnitude = np.array(np.iinfo(bits).max >> 1, bits)
    return bool((values.view(bits) & magnitude).max() < infinity)


# -- Writing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is fetched to the host when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def renamed_when_complete(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary directory beside ``target`` that takes its name if the body succeeds and vanishes if it does not.

    Raises:
        InputError: the file system refuses (full, read-only, not permitted).
    """
    new_parents = list(itertools.takewhile(lambda parent: not parent.exists(), target.parents))
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's directories are closed to others
        temporary.rename(target)  # over an empty directory, too
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{target} cannot be written: {one_line(error)}") from error
        raise


def write_weights(directory: pathlib.Path, tensors: Sequence[TensorToWrite], max_shard_bytes: int) -> None:
    """Writes ``model.safetensors``, or shards and their index if one file would take over ``max_shard_bytes``."""
    shards: list[list[TensorToWrite]] = [[]]
    shard_bytes = total_bytes = 0
    for tensor in tensors:
        if shards[-1] and shard_bytes + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += tensor.num_bytes
        total_bytes += tensor.num_bytes
    if len(shards) == 1:
        _write_safetensors(directory / _SAFETENSORS, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = _SAFETENSORS_SHARD.format(number=number, count=len(shards))
        _write_safetensors(directory / name, shard)
        weight_map.update({tensor.key: name for tensor in shard})
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(directory / f"{_SAFETENSORS}{_INDEX_SUFFIX}", index)


def _write_safetensors(path: pathlib.Path, tensors: Sequence[TensorToWrite]) -> None:
    """Writes one file tensor by tensor; the library's own writer wants all of them in memory at once.

    The format: the header's length in 8 bytes, little-endian; the header, JSON padded with spaces to a multiple of 8
    bytes; the tensors without gaps (https://huggingface.co/docs/safetensors).
    """
    spelling = {STORED_DTYPES[ours]: name for name, ours in _DTYPE_OF_SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        dtype = spelling[tensor.dtype]
        header[tensor.key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.fetch())
            assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype), tensor.key
            file.write(values.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())  # a full disk must show before the rename
