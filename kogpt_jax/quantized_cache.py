"""Quantised weights that are kept on this machine: made from a checkpoint once, then loaded like any other.

An entry is a folder of ``cache_dir() / "quantized"`` in Hugging Face's layout, so that it serves any mesh: INT8
matrices with their scales, the rest in the model's dtype, and a ``config.json`` whose ``quantization_config`` says what
it was made of. Its name holds a digest of that, so another source, dtype, scheme or format is another entry. An entry
is written beside its place and renamed: it is whole or not there, and of two processes that make the same one the first
wins. Entries are for this machine only: what is derived from weights has the weights' licence.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from kogpt_jax import checkpoint, distributed, runtime, smoothing
from kogpt_jax._version import __version__
from kogpt_jax.config import ModelConfig
from kogpt_jax.errors import InputError
from kogpt_jax.json_files import read_json_object, write_json
from kogpt_jax.sharding import ONE_DEVICE, Split
from kogpt_jax.smoothing import Calibration
from kogpt_jax.weight_files import find_weight_files, renamed_when_complete

# Of what `checkpoint.write_leaves` writes and how `quantize` rounds: another number makes every entry anew.
FORMAT_VERSION = 1

# In an entry of smoothed weights: what made them, and what was found for each layer.
SMOOTHING_FILE = "smoothing.json"

# Unfinished folders of this age were left by a process that was killed.
_STALE_S = 24 * 3600

_logger = logging.getLogger("kogpt_jax")


def directory() -> pathlib.Path:
    """Where entries lie. It may not exist yet."""
    return runtime.cache_dir() / "quantized"


def load_leaves(
    source: pathlib.Path,
    config: ModelConfig,
    mesh: Mesh,
    *,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> list[jax.Array]:
    """The leaves of a quantised model: from the cache, else quantised from ``source`` and kept.

    An entry that cannot be read is made anew; where it cannot be written, one warning says so and the model is used as
    it is. Several processes make no entry: they take one that all of them find, or quantise each time.

    Args:
        source: a Hugging Face directory.
        config: of the quantised model.
        mesh: where the leaves go.
        calibration: of a smoothed model, one that ``has_multiplier``: the text.
        progress: show progress bars, if stderr is a terminal.

    Raises:
        InputError: what `checkpoint.load_leaves` refuses of ``source``; a smoothed model, which is made on one device,
            cannot be kept and ``mesh`` has several, or there is none and several processes want it.
    """
    record = _record(source, config, calibration)
    entry = _entry(source, record)
    if jax.process_count() > 1:
        return _load_in_several(source, config, mesh, entry, record, progress)
    if _is_complete(entry, record):
        try:
            return checkpoint.load_leaves(entry, config, mesh, is_stored_quantized=True, progress=progress)
        except InputError as error:
            _logger.warning("quantised weights are made anew: %s", error)
    _discard(entry)  # before the time that making takes: then another process's may be there
    report = None
    if calibration is None:
        leaves = checkpoint.load_leaves(source, config, mesh, progress=progress)
    else:
        leaves, chosen = smoothing.make_leaves(source, config, calibration, progress=progress)
        report = _smoothing_report(record, calibration, chosen)
    try:
        with renamed_when_complete(entry) as temporary:
            checkpoint.write_leaves(temporary, config, leaves, Split.of(mesh) if report is None else ONE_DEVICE)
            write_json(temporary / "config.json", config.to_hf_dict() | {"quantization_config": record})
            if report is not None:
                write_json(temporary / SMOOTHING_FILE, report)
    except InputError as error:
        if not _is_complete(entry, record):  # or another process was first
            if report is not None and mesh.size > 1:
                raise
            _logger.warning("quantised weights are not kept: %s", error)
    if report is None or mesh.size == 1:
        return leaves
    return checkpoint.load_leaves(entry, config, mesh, is_stored_quantized=True, progress=progress)


def _load_in_several(
    source: pathlib.Path,
    config: ModelConfig,
    mesh: Mesh,
    entry: pathlib.Path,
    record: dict[str, Any],
    progress: bool,
) -> list[jax.Array]:
    """`load_leaves` of one of several processes, each of which may have a cache folder of its own."""
    if distributed.smallest(_is_complete(entry, record)):
        return checkpoint.load_leaves(entry, config, mesh, is_stored_quantized=True, progress=progress)
    if config.has_multiplier:
        raise InputError(
            f"smoothed weights are made in one process, and not all processes find theirs: {entry} is missing; "
            "kogpt quantize makes them"
        )
    if jax.process_index() == 0:
        _logger.warning("quantised weights are not kept by several processes; kogpt quantize makes them ahead")
    return checkpoint.load_leaves(source, config, mesh, progress=progress)


def smoothing_of(entry: pathlib.Path) -> list[dict[str, dict[str, float]]]:
    """What was found for each layer of a smoothed entry: "strength", "error" and "error_without" of each product.

    Raises:
        InputError: the entry has no such record.
    """
    return read_json_object(entry / SMOOTHING_FILE)["layers"]


def find_entry(
    source: pathlib.Path, config: ModelConfig, calibration: Calibration | None = None
) -> pathlib.Path | None:
    """The folder of a model's entry, None if there is none."""
    record = _record(source, config, calibration)
    entry = _entry(source, record)
    return entry if _is_complete(entry, record) else None


def size() -> tuple[int, int]:
    """How many entries there are and their bytes."""
    entries = [path for path in directory().glob("[!.]*") if path.is_dir()]
    return len(entries), sum(file.stat().st_size for entry in entries for file in entry.iterdir())


def _record(source: pathlib.Path, config: ModelConfig, calibration: Calibration | None = None) -> dict[str, Any]:
    """All that an entry's content depends on, as JSON has it."""
    if config.has_multiplier != (calibration is not None):
        raise ValueError(f"a model with has_multiplier {config.has_multiplier} and calibration {calibration}")
    source = source.resolve()
    files = [(path, path.stat()) for path in find_weight_files(source)]
    return {
        "quant_method": "kogpt_jax",
        # w8a8 has w8a16's weights, unless they are smoothed.
        "scheme": "w8a16" if calibration is None else "w8a8-smoothed",
        "dtype": config.dtype,
        "format_version": FORMAT_VERSION,
        # The path too: files of two models may have one size, and archives that set every time to the same are common.
        "source": str(source),
        "files": {path.name: [stat.st_size, stat.st_mtime_ns] for path, stat in files},
        **({} if calibration is None else {"calibration": calibration.record | {"model": _model_record(config)}}),
    }


def _model_record(config: ModelConfig) -> dict[str, Any]:
    """What of a configuration calibration depends on."""
    fields = dataclasses.asdict(smoothing.unquantized(config, "fp32"))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _smoothing_report(
    record: dict[str, Any], calibration: Calibration, chosen: Sequence[Mapping[str, smoothing.Choice]]
) -> dict[str, Any]:
    """What made a smoothed entry, and what was found for each layer."""
    return {
        "made_of": record,
        "calibration_file": calibration.text.path.name,
        "versions": {"kogpt_jax": __version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "layers": [
            {
                name: {field: getattr(choice, field) for field in ("strength", "error", "error_without")}
                for name, choice in choices.items()
            }
            for choices in chosen
        ],
    }


def _entry(source: pathlib.Path, record: dict[str, Any]) -> pathlib.Path:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    name = source.resolve().name[:40]
    return directory() / f"{name}-{record['scheme']}-{record['dtype']}-{digest[:16]}"


def _is_complete(entry: pathlib.Path, record: dict[str, Any]) -> bool:
    """Whether there is an entry that was made of this; whether its weights can be read is seen when they are."""
    if "calibration" in record and not (entry / SMOOTHING_FILE).is_file():
        return False
    try:
        return read_json_object(entry / "config.json").get("quantization_config") == record
    except InputError:
        return False


def _discard(entry: pathlib.Path) -> None:
    """Removes what lies in an entry's place, and what killed processes left of their work on it."""
    shutil.rmtree(entry, ignore_errors=True)
    for unfinished in entry.parent.glob(f".{entry.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - unfinished.stat().st_mtime > _STALE_S:
                shutil.rmtree(unfinished, ignore_errors=True)
