"""What a reader needs to judge a measured figure (machine, device, versions, commit), and the file that holds both."""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax

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
    """Writes a result as JSON, whole whenever the run ends; without a path nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.rename(path)


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
