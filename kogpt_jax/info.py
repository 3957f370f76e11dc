"""What ``kogpt info`` tells: versions, devices, settings, and what a model is and needs."""

import dataclasses
import importlib.metadata
import math
import pathlib
import platform
from collections.abc import Iterator
from typing import Any, get_args

import jax

import custom_ops
from custom_ops import autotune
from kogpt_jax import checkpoint, demo, kv_cache, ops, quantized_cache, runtime, tokenizer
from kogpt_jax._version import __version__
from kogpt_jax.config import KOGPT_6B, Dtype, ModelConfig
from kogpt_jax.engine import resolve_eos
from kogpt_jax.model import model_def

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")  # beside kogpt_jax itself


def make_report(model: str | None) -> dict[str, Any]:
    """The facts as JSON has them; with a directory or ``"demo"`` those of that model too, weights unread.

    Raises:
        InputError: what loading the configuration or the tokenizer refuses.
    """
    settings = runtime.settings()  # before the first look at the devices: it says how they are set up
    report: dict[str, Any] = {} if model is None else {"model": _model_report(model)}
    report["versions"] = {
        "kogpt_jax": __version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
    }
    report["devices"] = [_device_report(device) for device in jax.devices()]
    report["ops"] = _ops_report(model)
    report["settings"] = [setting._asdict() for setting in settings]
    report["cache_dir"] = str(runtime.cache_dir())
    num_models, num_bytes = quantized_cache.size()
    report["quantized_cache"] = {
        "directory": str(quantized_cache.directory()),
        "models": num_models,
        "bytes": num_bytes,
    }
    return report


def _device_report(device: jax.Device) -> dict[str, Any]:
    memory = device.memory_stats() or {}  # a CPU tells nothing
    return {
        "name": str(device),
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": memory.get("bytes_limit"),
        "memory_in_use_bytes": memory.get("bytes_in_use"),
    }


def _ops_report(model: str | None) -> dict[str, Any]:
    """The compiled libraries, and what the model (without one: KoGPT-6B) runs on here."""
    model_config = KOGPT_6B if model is None else checkpoint.load_config(_directory(model))
    choices = {dtype: dataclasses.replace(model_config, dtype=dtype) for dtype in get_args(Dtype)}
    for quant in ("w8a16", "w8a8"):  # with the dtype of the stored weights
        choices[quant] = dataclasses.replace(model_config, quant=quant)
    choices["int8 cache"] = dataclasses.replace(model_config, kv_dtype="int8")
    platform_name = jax.default_backend()
    device = autotune.find_device(platform_name)
    return {
        "jaxlib_ffi_version": custom_ops.jaxlib_ffi_version(),
        "libraries": [dataclasses.asdict(library) for library in custom_ops.library_info()],
        "auto": {
            name: ops.describe(ops.resolve_ops(config, "auto", platform=platform_name))
            for name, config in choices.items()
        },
        # What `kogpt autotune` and the package's own files know of this device.
        "timed": None
        if device is None
        else {"device": device.name, "products": len(autotune.load_table(platform_name))},
    }


def _directory(model: str) -> pathlib.Path:
    return demo.DIRECTORY if model == "demo" else pathlib.Path(model)


def _model_report(model: str) -> dict[str, Any]:
    directory = _directory(model)
    model_config = checkpoint.load_config(directory)
    file = tokenizer.find_tokenizer(directory)
    loaded = None if file is None else tokenizer.load_tokenizer(file)
    model_config = resolve_eos(model_config, loaded)
    by_dtype = {dtype: dataclasses.replace(model_config, dtype=dtype) for dtype in get_args(Dtype)}
    num_params = sum(math.prod(param.shape) for param in model_def(model_config).params)
    num_pages = kv_cache.pages_per_row(model_config.max_len)
    return {
        "directory": str(directory),
        "config": dataclasses.asdict(model_config),  # its dtype is that of the stored weights
        "num_params": num_params,
        "weight_bytes": {
            **{dtype: _weight_bytes(other) for dtype, other in by_dtype.items()},
            "w8a16": _weight_bytes(dataclasses.replace(model_config, dtype="bf16", quant="w8a16")),
        },
        # Of a row that may fill the whole context.
        "kv_cache_bytes_per_row": {
            name: kv_cache.cache_bytes_per_row(other, num_pages * kv_cache.PAGE_LEN)
            for name, other in (by_dtype | {"int8": dataclasses.replace(model_config, kv_dtype="int8")}).items()
        },
        "tokenizer": None if loaded is None else _tokenizer_report(loaded),
    }


def _weight_bytes(config: ModelConfig) -> int:
    """Bytes of a model's parameters."""
    return sum(math.prod(param.shape) * param.dtype.itemsize for param in model_def(config).params)


def _tokenizer_report(loaded: tokenizer.Tokenizer) -> dict[str, Any]:
    roles = ("bos", "eos", "unk", "pad", "mask")
    return {
        "file": str(loaded.path),
        "vocab_size": loaded.vocab_size,
        "special_ids": {role: getattr(loaded, f"{role}_id") for role in roles},
    }


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people: a line a fact."""
    facts: list[tuple[str, str]] = []
    if model := report.get("model"):
        facts.append(("model", model["directory"]))
        facts += [(f"  {name}", str(value)) for name, value in model["config"].items()]
        facts.append(("  parameters", f"{model['num_params']:,}"))
        for name, key in (("weights", "weight_bytes"), ("KV cache per row", "kv_cache_bytes_per_row")):
            sizes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in model[key].items())
            facts.append((f"  {name}", sizes))
        if found := model["tokenizer"]:
            special = ", ".join(f"{role} {token_id}" for role, token_id in found["special_ids"].items())
            facts.append(("  tokenizer", f"{found['file']}, {found['vocab_size']} tokens, {special}"))
        else:
            facts.append(("  tokenizer", "none"))
    facts += report["versions"].items()
    for device in report["devices"]:
        memory = ""
        if device["memory_bytes"] is not None:
            memory = f"{format_bytes(device['memory_in_use_bytes'])} of {format_bytes(device['memory_bytes'])} in use"
        facts.append(("device", ", ".join(filter(None, (device["name"], device["kind"], memory)))))
    facts += _ops_facts(report["ops"])
    facts += [("setting", "{name} = {value} (by {origin})".format(**setting)) for setting in report["settings"]]
    facts.append(("cache folder", report["cache_dir"]))
    kept = report["quantized_cache"]
    size = f"{kept['models']} models, {format_bytes(kept['bytes'])}"
    facts.append(("quantised weights", f"{kept['directory']}, {size}"))
    width = max(len(name) for name, _ in facts)
    return (f"{name:<{width}}  {value}" for name, value in facts)


def _ops_facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for library in report["libraries"]:
        if library["path"] is not None:
            built = [*library["architectures"], *library["compilers"]]
            if library["instruction_set"] is not None:
                built.append(library["instruction_set"])
            if library["ffi_version"] is not None:
                built.append(f"XLA FFI {_dotted(library['ffi_version'])}")
            yield f"{library['name']} library", ", ".join([library["path"], *built])
        if library["left_out"]:
            yield f"{library['name']} library", f"was built without {', '.join(library['left_out'])}"
        if library["problem"] is not None:
            yield f"{library['name']} library", f"cannot be used: {library['problem']}"
    if report["jaxlib_ffi_version"] is not None:
        yield "jaxlib's XLA FFI", _dotted(report["jaxlib_ffi_version"])
    for name, ops_line in report["auto"].items():
        yield f"ops with {name}", ops_line
    if timed := report["timed"]:
        yield "timed products", f"{timed['products']} on {timed['device']}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def format_bytes(num_bytes: int) -> str:
    """A number of bytes for people, in binary units."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"
