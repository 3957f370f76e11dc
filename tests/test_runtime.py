"""Process-wide settings. Each test starts processes of its own, since JAX takes most of the settings only once."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

import kogpt_jax.runtime

_PACKAGE = pathlib.Path(kogpt_jax.runtime.__file__).parent

# What runtime.py sets or reads, so that neither the shell nor another test reaches the child process.
_CLEARED = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
    "KOGPT_CACHE_DIR",
    "XDG_CACHE_HOME",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)

_REPORT = """
import json, os
import jax
from kogpt_jax import runtime
jax.config.update("jax_num_cpu_devices", 1)  # raises if importing the package has started the backend
{before}
runtime.configure()
runtime.configure()
names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
report = {{name: getattr(jax.config, name) for name in names}}
report |= {{name: os.environ.get(name) for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")}}
report["settings"] = runtime.settings()
print(json.dumps(report))
"""

_COMPILE = """
import jax, jax.monitoring, jax.numpy as jnp
from kogpt_jax import runtime
runtime.configure()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0))(jnp.ones((16, 16))).block_until_ready()
print(len(hits))
"""


def _run(monkeypatch, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in _CLEARED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)


def _report(monkeypatch, before: str = "", **environment: str) -> dict:
    completed = _run(monkeypatch, _REPORT.format(before=before), **environment)
    assert completed.stderr == ""
    return json.loads(completed.stdout)


def test_defaults_and_their_origin(monkeypatch, tmp_path):
    report = _report(monkeypatch, XDG_CACHE_HOME=str(tmp_path))
    folder = str(tmp_path / "kogpt_jax" / "xla")
    assert report["jax_compilation_cache_dir"] == folder
    assert report["jax_persistent_cache_min_compile_time_secs"] == 0
    assert report["XLA_CLIENT_MEM_FRACTION"] == ".92"
    assert report["settings"] == [
        ["XLA_CLIENT_MEM_FRACTION", ".92", "kogpt_jax"],
        ["jax_compilation_cache_dir", folder, "kogpt_jax"],
        ["jax_persistent_cache_min_compile_time_secs", "0.0", "kogpt_jax"],
        ["jax_persistent_cache_min_entry_size_bytes", "0", "jax"],
    ]


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_environment_of_the_user_stays(monkeypatch, tmp_path, name):
    chosen = str(tmp_path / "chosen")
    environment = {name: ".5", "JAX_COMPILATION_CACHE_DIR": chosen, "KOGPT_CACHE_DIR": str(tmp_path / "unused")}
    report = _report(monkeypatch, **environment)
    assert report[name] == ".5"
    assert [report["XLA_CLIENT_MEM_FRACTION"], report["XLA_PYTHON_CLIENT_MEM_FRACTION"]].count(None) == 1
    assert report["jax_compilation_cache_dir"] == chosen
    assert report["jax_persistent_cache_min_compile_time_secs"] == 1
    assert report["settings"] == [[name, ".5", "user"], ["jax_compilation_cache_dir", chosen, "user"]]
    assert not (tmp_path / "unused").exists()


def test_jax_config_of_the_user_stays(monkeypatch, tmp_path):
    before = "jax.config.update('jax_persistent_cache_min_compile_time_secs', 3.5)"
    report = _report(monkeypatch, before, KOGPT_CACHE_DIR=str(tmp_path))
    assert ["jax_compilation_cache_dir", str(tmp_path / "xla"), "user"] in report["settings"]
    assert ["jax_persistent_cache_min_compile_time_secs", "3.5", "user"] in report["settings"]
    assert report["jax_persistent_cache_min_compile_time_secs"] == 3.5


def test_switched_off_cache_stays_off(monkeypatch, tmp_path):
    report = _report(monkeypatch, JAX_ENABLE_COMPILATION_CACHE="0", KOGPT_CACHE_DIR=str(tmp_path / "unused"))
    assert report["jax_compilation_cache_dir"] is None
    assert ["jax_enable_compilation_cache", "False", "user"] in report["settings"]
    assert not (tmp_path / "unused").exists()


def test_unwritable_folder_is_one_warning_line(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    completed = _run(monkeypatch, _COMPILE, KOGPT_CACHE_DIR=str(file))
    assert completed.stdout == "0\n"
    assert completed.stderr.count("\n") == 1
    assert str(file / "xla") in completed.stderr
    assert "Not a directory" in completed.stderr


def test_second_process_compiles_nothing(monkeypatch, tmp_path):
    first = _run(monkeypatch, _COMPILE, KOGPT_CACHE_DIR=str(tmp_path))
    kept = {path.name for path in (tmp_path / "xla").iterdir()}
    second = _run(monkeypatch, _COMPILE, KOGPT_CACHE_DIR=str(tmp_path))
    assert first.stdout == "0\n"
    assert kept
    assert {path.name for path in (tmp_path / "xla").iterdir()} == kept
    assert int(second.stdout) == len(kept)
    assert first.stderr == second.stderr == ""


def test_environment_is_read_in_one_place():
    readers = {
        str(path.relative_to(_PACKAGE))
        for path in _PACKAGE.rglob("*.py")
        if re.search(r"\b(environ|getenv)\b", path.read_text(encoding="utf-8"))
    }
    assert readers == {"runtime.py"}
