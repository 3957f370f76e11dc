"""Checkpoints in Hugging Face layout: one table of names, a streaming load and an atomic save.

``_TABLE`` maps our parameters to Hugging Face keys both ways. A fused weight is put together from its parts while they
are read and taken apart again while they are written; no other module knows a Hugging Face key.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kogpt_jax.config import DTYPES, Dtype, ModelConfig
from kogpt_jax.errors import InputError
from kogpt_jax.json_files import write_json
from kogpt_jax.model import ParamSpec, model_def, quantized_as
from kogpt_jax.progress import progress_bar
from kogpt_jax.sharding import ONE_DEVICE, Split, named_sharding
from kogpt_jax.weight_files import (
    STORED_DTYPES,
    Block,
    StoredTensor,
    TensorToWrite,
    open_tensors,
    read_ahead,
    renamed_when_complete,
    split_rows,
    write_weights,
)

# XLA's CPU backend takes a host buffer of this alignment as it is; any other it copies.
_ALIGNMENT = 64
MAX_SHARD_BYTES = 5_000_000_000  # of a weight file, unless a single tensor takes more


# -- The table: our parameters and Hugging Face's keys ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One of our parameters: the stored tensors that make it up, each with its shape in the project's letters.

    ``stacked`` says how they lie in a layer's share of the leaf: side by side along the rows or the columns of each
    tensor shard, which holds the same share of every part; "once" where all parts are the same values, which all shards
    share; None for a parameter that is one stored tensor and has no shard axis.
    """

    parts: tuple[tuple[str, str], ...]
    stacked: Literal["rows", "columns", "once"] | None = None


# `{i}` is the layer; scales are there in quantised models only, multipliers in smoothed ones. The order is the one in
# which a checkpoint is written.
_TABLE: dict[str, _Entry] = {
    "embedding": _Entry((("transformer.wte.weight", "VD"),)),
    "blocks.{i}.ln_scale": _Entry((("transformer.h.{i}.ln_1.weight", "D"),)),
    "blocks.{i}.ln_bias": _Entry((("transformer.h.{i}.ln_1.bias", "D"),)),
    "blocks.{i}.w_in": _Entry(
        (
            ("transformer.h.{i}.attn.q_proj.weight", "DD"),
            ("transformer.h.{i}.attn.k_proj.weight", "DD"),
            ("transformer.h.{i}.attn.v_proj.weight", "DD"),
            ("transformer.h.{i}.mlp.fc_in.weight", "FD"),
        ),
        stacked="rows",
    ),
    "blocks.{i}.w_in_scale": _Entry(
        (
            ("transformer.h.{i}.attn.q_proj.weight_scale", "D1"),
            ("transformer.h.{i}.attn.k_proj.weight_scale", "D1"),
            ("transformer.h.{i}.attn.v_proj.weight_scale", "D1"),
            ("transformer.h.{i}.mlp.fc_in.weight_scale", "F1"),
        ),
        stacked="rows",
    ),
    "blocks.{i}.b_ffn_in": _Entry((("transformer.h.{i}.mlp.fc_in.bias", "F"),), stacked="rows"),
    "blocks.{i}.w_out": _Entry(
        (("transformer.h.{i}.attn.out_proj.weight", "DD"), ("transformer.h.{i}.mlp.fc_out.weight", "DF")),
        stacked="columns",
    ),
    "blocks.{i}.w_out_scale": _Entry(
        (("transformer.h.{i}.attn.out_proj.weight_scale", "D1"), ("transformer.h.{i}.mlp.fc_out.weight_scale", "D1")),
        stacked="once",
    ),
    "blocks.{i}.w_out_multiplier": _Entry(
        (
            ("transformer.h.{i}.attn.out_proj.input_multiplier", "D"),
            ("transformer.h.{i}.mlp.fc_out.input_multiplier", "F"),
        ),
        stacked="rows",
    ),
    "blocks.{i}.b_ffn_out": _Entry((("transformer.h.{i}.mlp.fc_out.bias", "D"),)),
    "ln_f_scale": _Entry((("transformer.ln_f.weight", "D"),)),
    "ln_f_bias": _Entry((("transformer.ln_f.bias", "D"),)),
    "lm_head": _Entry((("lm_head.weight", "VD"),)),
    "lm_head_scale": _Entry((("lm_head.weight_scale", "V1"),)),
    "lm_head_bias": _Entry((("lm_head.bias", "V"),)),
}

# Causal mask and mask value: constants that checkpoints of older transformers carry. Known by name, never read.
_BUFFERS = ("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """``leaf[dst] = stored[src]``: what of one stored tensor goes to one place of a leaf.

    ``dst`` has the axes of ``src`` behind those of stages and of tensor shards, where the leaf has such; of these it
    takes one each.
    """

    key: str
    shape: tuple[int, ...]  # of the whole stored tensor
    src: tuple[slice, ...]
    dst: tuple[slice, ...]


def _pieces(config: ModelConfig, split: Split) -> dict[str, tuple[_Piece, ...]]:
    """The table for one model: parameter path -> its pieces, a stage's after another's."""
    paths = {param.path for param in model_def(config, split).params}
    pieces = {}
    for template, entry in _TABLE.items():
        if "{i}" not in template:
            if template in paths:
                pieces[template] = tuple(_entry_pieces(entry, config, split.num_shards))
            continue
        for block in range(split.layers_per_stage(config.num_layers)):
            path = template.format(i=block)
            if path in paths:
                layers = enumerate(split.layers_of_block(block, config.num_layers))
                pieces[path] = tuple(
                    dataclasses.replace(piece, key=piece.key.format(i=layer), dst=(slice(stage, stage + 1), *piece.dst))
                    for stage, layer in layers
                    if layer < config.num_layers  # what is left over of the last stages stays zero
                    for piece in _entry_pieces(entry, config, split.num_shards)
                )
    return pieces


def _entry_pieces(entry: _Entry, config: ModelConfig, num_shards: int) -> Iterator[_Piece]:
    """The pieces of a parameter, of one layer if it has some: without the axis of stages, keys as in the table."""
    extents = {"V": config.vocab_size, "D": config.model_dim, "F": config.ffn_dim, "1": 1}
    axis = 1 if entry.stacked == "columns" else 0
    offset = 0  # along `axis`, within a shard
    for key, letters in entry.parts:
        shape = tuple(extents[letter] for letter in letters)
        whole = tuple(slice(0, extent) for extent in shape)
        if entry.stacked is None:
            yield _Piece(key, shape, whole, whole)
            continue
        if entry.stacked == "once":
            yield _Piece(key, shape, whole, (slice(0, 1), *whole))
            continue
        # Shard s of [Q | K | V | FFN] holds the s-th share of each: the rows of its own heads, not a cut of the stack.
        share = shape[axis] // num_shards
        for shard in range(num_shards):
            src, dst = list(whole), list(whole)
            src[axis] = slice(shard * share, (shard + 1) * share)
            dst[axis] = slice(offset, offset + share)
            yield _Piece(key, shape, tuple(src), (slice(shard, shard + 1), *dst))
        offset += share


def _check_keys(
    directory: pathlib.Path,
    tensors: Mapping[str, StoredTensor],
    config: ModelConfig,
    pieces: Mapping[str, Sequence[_Piece]],
    params: Sequence[ParamSpec],
) -> None:
    """Accounts for every key: each stored one is wanted and fits or is a known buffer, each wanted one is there."""
    shapes = {piece.key: piece.shape for group in pieces.values() for piece in group}
    dtypes = {piece.key: param.dtype for param in params for piece in pieces[param.path]}
    buffers = {name.format(i=layer) for name in _BUFFERS for layer in range(config.num_layers)}
    for key, stored in tensors.items():
        if key in buffers:
            continue
        if f"transformer.{key}" in shapes:
            raise InputError(f"{stored.file.path}: key {key!r} is one of GPTJModel, expected those of GPTJForCausalLM")
        if key not in shapes:
            raise InputError(f"{stored.file.path}: unknown key {key!r} for GPT-J with n_layer {config.num_layers}")
        if stored.shape != shapes[key]:
            wanted = list(shapes[key])
            raise InputError(f"{stored.file.path}: {key} has shape {list(stored.shape)}, config.json gives {wanted}")
        _check_dtype(stored, ("int8",) if dtypes[key] == np.int8 else DTYPES)
    missing = [key for key in shapes if key not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{directory}: key {missing[0]!r} is in none of the weight files{more}")


def _check_dtype(stored: StoredTensor, allowed: Sequence[str] = DTYPES) -> None:
    if stored.dtype not in allowed:
        expected = allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}"
        raise InputError(f"{stored.file.path}: {stored.key} has dtype {stored.dtype}, expected {expected}")


# -- Loading ----------------------------------------------------------------------------------------------------------


def stored_dtype(path: str | os.PathLike[str]) -> Dtype:
    """The dtype of a checkpoint's weights, from the tensors themselves: ``config.json`` often says something else.

    Where they differ, the dtype that holds the most elements of the weight matrices: LayerNorm and biases in fp32
    beside fp16 matrices give fp16.

    Raises:
        InputError: the files cannot be read, or a matrix is of another dtype than fp32, fp16 and bf16.
    """
    any_layer = re.compile(r"\.\d+\.")
    matrices = {key for entry in _TABLE.values() for key, letters in entry.parts if letters in ("VD", "DD", "FD", "DF")}
    elements: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as closing:
        for key, stored in open_tensors(pathlib.Path(path), closing).items():
            if any_layer.sub(".{i}.", key) in matrices:
                _check_dtype(stored)
                elements[stored.dtype] += math.prod(stored.shape)
    if not elements:
        raise InputError(f"{path}: the weight files hold no weight matrix of GPTJForCausalLM")
    return cast(Dtype, elements.most_common(1)[0][0])


def load_config(path: str | os.PathLike[str], *, dtype: Dtype | None = None) -> ModelConfig:
    """The configuration of a Hugging Face directory, with the dtype that is asked for (None: as stored).

    Raises:
        InputError: what ``ModelConfig.from_hf_dir`` and ``stored_dtype`` refuse.
    """
    config = ModelConfig.from_hf_dir(pathlib.Path(path))
    return dataclasses.replace(config, dtype=stored_dtype(path) if dtype is None else dtype)


def load_leaves(
    path: str | os.PathLike[str],
    config: ModelConfig,
    mesh: Mesh,
    *,
    is_stored_quantized: bool = False,
    progress: bool = False,
) -> list[jax.Array]:
    """Streams a checkpoint onto the devices of ``mesh``.

    Each stored tensor is read once, in blocks, by threads that read ahead; leaf after leaf in the order of the disk (a
    leaf holds a layer of every stage); of a tensor whose rows are sharded, only the rows that this process's devices
    hold. On the host live at most one leaf that is being filled, one that is under way to its device, and the buffers
    read ahead. A leaf stored in another dtype is converted on the device, and quantised there where ``config.quant``
    says so: from the values as stored. What stands for no layer or no token is zero.

    Args:
        path: a directory with ``model.safetensors`` or ``pytorch_model.bin``, or shards of either with their index.
        config: as ``load_config`` gives it; the leaves are in ``config.dtype``.
        mesh: from ``sharding.make_mesh``.
        is_stored_quantized: the files hold what `write_leaves` writes of a quantised model.
        progress: show a progress bar, if stderr is a terminal.

    Returns:
        The leaves in the order of ``model_def(config, Split.of(mesh)).params``.

    Raises:
        InputError: a damaged or missing file; an unknown, missing or repeated key; a wrong shape or dtype; a value that
            is not finite, or not finite any more in ``config.dtype``; a mesh that does not divide the model.
    """
    directory = pathlib.Path(path)
    split = Split.of(mesh)
    specs = {param.path: param for param in model_def(config, split).params}
    stored_config = config if is_stored_quantized else dataclasses.replace(config, quant="none")
    pieces = _pieces(stored_config, split)
    params = model_def(stored_config, split).params
    with contextlib.ExitStack() as closing:
        tensors = open_tensors(directory, closing)
        _check_keys(directory, tensors, config, pieces, params)
        order = {key: position for position, key in enumerate(tensors)}
        plans = [_plan_leaf(param, pieces[param.path], tensors, mesh) for param in params]
        plans.sort(key=lambda plan: min(order[piece.key] for piece in plan.pieces))
        blocks = [block for plan in plans for block in plan.blocks]
        num_bytes = sum(block.num_bytes for block in blocks)
        advance = closing.enter_context(progress_bar(num_bytes, progress, counts_bytes=True))
        stream = closing.enter_context(contextlib.closing(read_ahead(blocks)))
        leaves: dict[str, jax.Array] = {}
        previous: dict[str, jax.Array] = {}
        for plan in plans:
            parts = _fill_leaf(plan, tensors, stream, advance)
            jax.block_until_ready(previous)
            leaf = _place_leaf(plan, parts)
            del parts
            path_of_leaf = plan.param.path
            if specs[path_of_leaf].dtype == plan.param.dtype:
                previous = {path_of_leaf: _converted(plan, leaf)}
            else:
                previous = quantized_as(specs, path_of_leaf, leaf, mesh)
            del leaf
            leaves |= previous
        jax.block_until_ready(previous)
    return [leaves[name] for name in specs]


@dataclasses.dataclass(frozen=True)
class _LeafPlan:
    """A leaf: its pieces, the parts of it that this process's devices hold, and what is read for them."""

    param: ParamSpec
    pieces: tuple[_Piece, ...]
    sharding: NamedSharding
    parts: list[tuple[slice, ...]]
    devices: list[list[jax.Device]]  # of each part; replicas share one
    blocks: list[Block]


def _plan_leaf(
    param: ParamSpec, pieces: tuple[_Piece, ...], tensors: Mapping[str, StoredTensor], mesh: Mesh
) -> _LeafPlan:
    sharding = named_sharding(mesh, param.logical_axes)
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}  # by bounds: slices have no hash in Python 3.11
    for device, index in sharding.addressable_devices_indices_map(param.shape).items():
        assert index is not None  # it is addressable
        bounds = tuple(cut.indices(extent)[:2] for cut, extent in zip(index, param.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    parts = [tuple(slice(*bound) for bound in bounds) for bounds in devices]
    blocks: list[Block] = []
    for key, group in itertools.groupby(pieces, lambda piece: piece.key):
        overlaps = [_overlap(piece, part) for piece in group for part in parts]
        rows = [overlap[0][0] for overlap in overlaps if overlap is not None]
        if rows:
            blocks.extend(split_rows(tensors[key], min(cut.start for cut in rows), max(cut.stop for cut in rows)))
    return _LeafPlan(param, pieces, sharding, parts, list(devices.values()), blocks)


def _overlap(piece: _Piece, part: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What of a piece falls into a device's part of the leaf: where in the stored tensor, and where in the part."""
    local, within_piece = [], []
    for dst, own in zip(piece.dst, part, strict=True):
        start, stop = max(dst.start, own.start), min(dst.stop, own.stop)
        if start >= stop:
            return None
        local.append(slice(start - own.start, stop - own.start))
        within_piece.append(slice(start - dst.start, stop - dst.start))
    within_piece = within_piece[len(piece.dst) - len(piece.src) :]  # without those of stages and shards
    region = [
        slice(src.start + cut.start, src.start + cut.stop) for src, cut in zip(piece.src, within_piece, strict=True)
    ]
    return tuple(region), tuple(local)


def _fill_leaf(
    plan: _LeafPlan,
    tensors: Mapping[str, StoredTensor],
    stream: Iterator[tuple[Block, np.ndarray]],
    advance: Callable[[str, int], None],
) -> list[np.ndarray]:
    """One host array for each of ``plan.parts``, filled from ``plan.blocks``, which come next in ``stream``; zero where
    nothing is stored."""
    dtypes = {tensors[piece.key].dtype for piece in plan.pieces}
    dtype = STORED_DTYPES[dtypes.pop() if len(dtypes) == 1 else "fp32"]  # mixed ones meet in fp32, which is exact
    arrays = [_aligned_empty(tuple(cut.stop - cut.start for cut in part), dtype) for part in plan.parts]
    # Key -> (region of the stored tensor, the view of an array that it fills, of the region's shape).
    targets: dict[str, list[tuple[tuple[slice, ...], np.ndarray]]] = {}
    for part, array in zip(plan.parts, arrays, strict=True):
        num_filled = 0
        for piece in plan.pieces:
            overlap = _overlap(piece, part)
            if overlap is not None:
                region, local = overlap
                view = array[local][(0,) * (len(local) - len(region))]
                targets.setdefault(piece.key, []).append((region, view))
                num_filled += view.size
        if num_filled < array.size:
            array.fill(0)
    for _ in plan.blocks:
        block, values = next(stream)
        first = block.rows.start
        for (rows, *columns), view in targets[block.stored.key]:
            start, stop = max(rows.start, first), min(rows.stop, block.rows.stop)
            if start < stop:
                view[start - rows.start : stop - rows.start] = values[start - first : stop - first, *columns]
        advance(block.stored.file.path.name, block.num_bytes)
    return arrays


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _place_leaf(plan: _LeafPlan, parts: Sequence[np.ndarray]) -> jax.Array:
    """Puts a leaf's parts on their devices, in the dtype they are stored in.

    On CPU devices the array is the host buffer itself, so nobody may write to ``parts`` again.
    """
    arrays: list[jax.Array] = []
    for part, devices in zip(parts, plan.devices, strict=True):
        part.flags.writeable = False
        arrays.extend(jax.device_put(part, device) for device in devices)
    return jax.make_array_from_single_device_arrays(plan.param.shape, plan.sharding, arrays)


def _converted(plan: _LeafPlan, leaf: jax.Array) -> jax.Array:
    """A leaf in the dtype of its parameter."""
    param = plan.param
    if leaf.dtype == param.dtype:
        return leaf
    converted, is_finite = _converter(param.dtype, plan.sharding)(leaf)
    if not is_finite:
        key = next(piece.key for piece in plan.pieces if not jnp.isfinite(converted[piece.dst]).all())
        path = next(block.stored.file.path for block in plan.blocks if block.stored.key == key)
        raise InputError(f"{path}: {key} holds values too large for {param.dtype}")
    return converted


@functools.cache
def _converter(dtype: np.dtype, sharding: NamedSharding) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A jitted cast of finite values to ``dtype`` that also says whether the result is finite."""

    def convert(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        converted = leaf.astype(dtype)
        can_overflow = jnp.finfo(leaf.dtype).max > jnp.finfo(dtype).max
        return converted, jnp.isfinite(converted).all() if can_overflow else jnp.array(True)

    return jax.jit(convert, out_shardings=(sharding, NamedSharding(sharding.mesh, PartitionSpec())))


# -- Saving -----------------------------------------------------------------------------------------------------------


def save_pretrained(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    leaves: Sequence[jax.Array],
    *,
    split: Split = ONE_DEVICE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_files: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Writes a directory that ``transformers.GPTJForCausalLM.from_pretrained`` and ``load_leaves`` read.

    Tensors go to the disk one by one, into a temporary directory beside the target that is renamed when it is complete:
    after a failure or an interrupt the target is as it was.

    Args:
        directory: does not exist yet, or is empty.
        config: of the model; its ``dtype`` is the leaves'. Not quantised: transformers could not read that.
        leaves: in the order of ``model_def(config, split).params``.
        split: how they are cut. The files are the same however that is.
        max_shard_bytes: no weight file's tensors take more, unless a single one does.
        tokenizer_files: copied into the directory under their own names.

    Raises:
        InputError: the model is quantised, the directory is not empty or cannot be written, a tokenizer file is missing
            or has a name that is taken, ``max_shard_bytes`` is not positive.
        ValueError: the leaves are not those of ``config``.
    """
    if config.quant != "none":
        raise InputError(
            f"a model with quant {config.quant} cannot be saved: transformers could not read it, and what is made of "
            "weights has their licence; load it without quant to save it"
        )
    target = pathlib.Path(os.path.realpath(directory))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{directory} exists and is not an empty directory")
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    hf_config = config.to_hf_dict()
    with renamed_when_complete(target) as temporary:
        write_json(temporary / "config.json", hf_config)
        write_json(temporary / "generation_config.json", {"eos_token_id": hf_config["eos_token_id"]})
        write_leaves(temporary, config, leaves, split, max_shard_bytes)
        for file in map(pathlib.Path, tokenizer_files):
            if not file.is_file():
                raise InputError(f"tokenizer file does not exist: {file}")
            if (temporary / file.name).exists():
                raise InputError(f"tokenizer file {file} has the name of another file of the checkpoint")
            shutil.copyfile(file, temporary / file.name)


def write_leaves(
    directory: pathlib.Path,
    config: ModelConfig,
    leaves: Sequence[jax.Array],
    split: Split = ONE_DEVICE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes weight files under Hugging Face's keys, tensor by tensor. Quantised matrices are INT8, each with its f32
    scales beside it: of ``KEY`` under ``KEY_scale``.

    Raises:
        ValueError: the leaves are not those of ``config``.
    """
    params = model_def(config, split).params
    for param, leaf in zip(params, leaves, strict=True):
        if (leaf.shape, leaf.dtype) != (param.shape, param.dtype):
            raise ValueError(f"{param.path} must be {param.dtype}{param.shape}, got {leaf.dtype}{leaf.shape}")
    by_path = {param.path: leaf for param, leaf in zip(params, leaves, strict=True)}
    parts_of = {
        key: (path, tuple(group))
        for path, pieces in _pieces(config, split).items()
        for key, group in itertools.groupby(pieces, lambda piece: piece.key)
    }
    tensors = []
    for pieces in _pieces(config, ONE_DEVICE).values():  # whose order is that of the files
        for piece in pieces:
            path, parts = parts_of[piece.key]
            fetch = functools.partial(_fetch, by_path[path], parts)
            tensors.append(TensorToWrite(piece.key, piece.shape, by_path[path].dtype, fetch))
    write_weights(directory, tensors, max_shard_bytes)


def _fetch(leaf: jax.Array, pieces: Sequence[_Piece]) -> np.ndarray:
    """A stored tensor, put together on the host from a leaf's pieces."""
    tensor = np.empty(pieces[0].shape, leaf.dtype)
    for piece in pieces:
        part = leaf[piece.dst]
        # An array keeps every host copy made of it: copy on the device first, so that the leaf keeps none.
        host = np.asarray(jnp.copy(leaf) if part is leaf else part)
        tensor[piece.src] = host.reshape(tensor[piece.src].shape)
    return tensor
