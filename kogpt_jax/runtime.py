"""Process-wide settings: the one place that makes them and the one place that reads environment variables.

| what                       | set to                    | left alone when the user has set                      |
|----------------------------|---------------------------|-------------------------------------------------------|
| XLA_CLIENT_MEM_FRACTION    | .92                       | it, or its older name XLA_PYTHON_CLIENT_MEM_FRACTION  |
| jax_compilation_cache_dir  | ``cache_dir() / "xla"``   | it, or jax_enable_compilation_cache to false          |
| jax_persistent_cache_min_* | 0 seconds, 0 bytes        | it, or the folder above                               |
| CUDA_MODULE_LOADING        | EAGER, see ``configure``  | it                                                    |

The lower-case names are JAX's options, which environment variables (``JAX_COMPILATION_CACHE_DIR``) set too. They count
from the start of JAX's backend on, that is from the first JAX operation of the process: ``configure`` comes before it.
It also tells `custom_ops.autotune` where the user's files are: in ``cache_dir() / "tuned"``.
"""

import logging
import os
import pathlib
import re
import tempfile
from typing import Any, Literal, NamedTuple

import jax
import platformdirs

from custom_ops import autotune
from kogpt_jax.errors import InputError

# Weights, cache and XLA's workspace live in XLA's own pool; the rest is for the CUDA context, cuDNN and NCCL. XLA's
# default is .75, which on an 80 GB GPU leaves 20 GB idle.
_MEM_FRACTION = ".92"
# XLA refuses to start when both names are set, so the older one counts as a choice of the user's too.
_MEM_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

_MODULE_LOADING = "CUDA_MODULE_LOADING"

# Name, JAX's default, ours. JAX keeps only programs that took a second to compile; here the second start shall compile
# nothing at all, and the small model is dozens of programs below a second. 0 bytes keeps entries of every size.
_CACHE_THRESHOLDS = (
    ("jax_persistent_cache_min_compile_time_secs", 1.0, 0.0),
    ("jax_persistent_cache_min_entry_size_bytes", 0, 0),
)

# Of several processes: how many there are, and which one this is. Open MPI started within a Slurm job knows better than
# Slurm, whose first name here exists only within `srun`.
_LAUNCHER_NAMES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 20000, 10000  # below those that Linux gives to outgoing connections

_logger = logging.getLogger("kogpt_jax")
_settings: tuple["Setting", ...] | None = None
_module_loading: Literal["user", "kogpt_jax", "jax"] = "jax"  # who chose it


class ProcessVariables(NamedTuple):
    """What the environment says of the processes that run one model together; None where it says nothing."""

    coordinator: str | None  # "HOST:PORT"
    num_processes: int | None
    process_id: int | None


class Setting(NamedTuple):
    """One process-wide setting, as ``kogpt info`` prints it."""

    name: str
    value: str
    origin: Literal["user", "kogpt_jax", "jax"]  # who chose the value; "jax": nobody did, it is JAX's default


def cache_dir() -> pathlib.Path:
    """The folder for what can be made anew: ``KOGPT_CACHE_DIR``, else the user's cache folder. It may not exist yet."""
    override = os.environ.get("KOGPT_CACHE_DIR")
    return pathlib.Path(override).expanduser() if override else platformdirs.user_cache_path("kogpt_jax")


def process_variables() -> ProcessVariables:
    """Reads what JAX's variables, Open MPI and Slurm say. The port within a Slurm job is a function of its number.

    Raises:
        InputError: a variable that is no number.
    """
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    nodes, job = os.environ.get("SLURM_STEP_NODELIST"), _number("SLURM_JOB_ID")
    # "node7,other", "node[07-12,15],other": the first name.
    first_node = re.match(r"([^,[]+)(?:\[(\w+))?", nodes or "")
    if coordinator is None and first_node is not None and job is not None:
        coordinator = f"{first_node[1]}{first_node[2] or ''}:{_FIRST_SLURM_PORT + job % _NUM_SLURM_PORTS}"
    own = ProcessVariables(coordinator, _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID"))
    if own.num_processes is not None or own.process_id is not None:
        return own
    for names in _LAUNCHER_NAMES:
        num_processes, process_id = map(_number, names)
        if num_processes is not None and process_id is not None:
            return ProcessVariables(coordinator, num_processes, process_id)
    return own


def _number(name: str) -> int | None:
    """An environment variable's."""
    value = os.environ.get(name)
    if value is not None and re.fullmatch(r"\d+", value, re.ASCII) is None:
        raise InputError(f"environment variable {name} must be a number, got {value!r}")
    return None if value is None else int(value)


def configure(*, num_shards: int = 1) -> None:
    """Makes the process-wide settings that the user has not made. Only the first call of a process does anything, and
    the first for a model that lies over several devices.

    For such a one CUDA loads all kernels when it starts, since one that is loaded while a device waits for another may
    make the other wait for the first (`custom_ops.all_reduce`). That takes a process in which CUDA has not started.

    A cache folder that cannot be written is no error: one warning names it and the process goes on without a cache.
    """
    global _settings, _module_loading
    if _settings is None:
        _settings = (_set_mem_fraction(), *_set_compilation_cache())
        autotune.set_user_folder(cache_dir() / "tuned")
    if num_shards > 1 and _module_loading == "jax":
        _module_loading = "user" if os.environ.get(_MODULE_LOADING) else "kogpt_jax"
        os.environ[_MODULE_LOADING] = os.environ.get(_MODULE_LOADING) or "EAGER"


def settings() -> tuple[Setting, ...]:
    """What is in force and who chose it, made by ``configure`` if that has not run yet."""
    configure()
    assert _settings is not None
    if _module_loading == "jax":
        return _settings
    return *_settings, Setting(_MODULE_LOADING, os.environ[_MODULE_LOADING], _module_loading)


def _set_mem_fraction() -> Setting:
    for name in _MEM_FRACTION_NAMES:
        if value := os.environ.get(name):
            return Setting(name, value, "user")
    os.environ[_MEM_FRACTION_NAMES[0]] = _MEM_FRACTION
    return Setting(_MEM_FRACTION_NAMES[0], _MEM_FRACTION, "kogpt_jax")


def _set_compilation_cache() -> tuple[Setting, ...]:
    """Switches on JAX's persistent compilation cache, unless the user has chosen a folder or switched it off."""
    name = "jax_compilation_cache_dir"
    if not _jax_option("jax_enable_compilation_cache"):
        return (Setting("jax_enable_compilation_cache", "False", "user"),)
    if (chosen := _jax_option(name)) is not None:
        return (Setting(name, str(chosen), "user"),)
    folder = cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Only a file that was really made shows that the folder can be written: root passes every permission check, and
        # a read-only file system fails for everybody.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _logger.warning("compiled programs are not kept: %s cannot be written (%s)", folder, error.strerror)
        return (Setting(name, "off, folder cannot be written", "kogpt_jax"),)
    jax.config.update(name, str(folder))
    origin: Literal["user", "kogpt_jax"] = "user" if os.environ.get("KOGPT_CACHE_DIR") else "kogpt_jax"
    return (Setting(name, str(folder), origin), *(_set_threshold(*threshold) for threshold in _CACHE_THRESHOLDS))


def _set_threshold(name: str, default: float, wanted: float) -> Setting:
    value = _jax_option(name)
    if name.upper() in os.environ or value != default:
        return Setting(name, str(value), "user")
    if value != wanted:
        jax.config.update(name, wanted)
        return Setting(name, str(wanted), "kogpt_jax")
    return Setting(name, str(value), "jax")


def _jax_option(name: str) -> Any:
    return getattr(jax.config, name)
