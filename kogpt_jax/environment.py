"""What a reader needs to judge a measured figure (machine, device, versions, commit), and the file that holds both."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from kogpt_jax.errors import InputError, one_line

_PACKAGES = ("kogpt-jax", "jax", "jaxlib", "flax", "numpy", "safetensors", "torch", "transformers")
_ROOT = pathlib.Path(__file__).parents[1]
_SOURCE_SUFFIXES = (".py", ".cc", ".cu", ".cuh", ".h", ".inc")


def environment() -> dict[str, Any]:
    """Commit, digest of the package's source, versions of what is installed, processor, device with its driver.

    The digest is there for machines that hold a copy of the source without its history: ``commit`` is None then.
    """
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "source_sha256": _source_digest(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "cpu": _cpu_model(),
        "device": device.device_kind,
        "num_devices": len(jax.devices()),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if device.platform == "gpu"
        else None,
    }


def write_result(path: pathlib.Path | None, result: dict[str, Any]) -> None:
    """Writes a result as JSON, whole whenever the run ends; without a path nothing.

    Raises:
        InputError: the file cannot be written.
    """
    if path is not None:
        with _beside(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)


def check_writable(path: pathlib.Path) -> None:
    """That a result can be written: asked before hours of measuring.

    Raises:
        InputError: it cannot.
    """
    with _beside(path):
        if path.is_dir():
            raise InputError(f"{path} cannot be written: it is a folder")


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file of its own in the path's folder, gone afterwards unless it was renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        os.chmod(name, 0o644)  # mkstemp's are closed to others
        try:
            yield pathlib.Path(name)
        finally:
            pathlib.Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or one_line(error)}") from error


def _commit() -> str | None:
    """None where the package does not run from a checkout of its own: another repository may lie around it."""
    is_checkout = (_ROOT / ".git").exists()
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty") if is_checkout else None


def _source_digest() -> str:
    digest = hashlib.sha256()
    for package in ("custom_ops", "kogpt_jax"):
        for path in sorted((_ROOT / package).rglob("*")):
            if path.suffix in _SOURCE_SUFFIXES:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
