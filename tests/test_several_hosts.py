"""The files under docs/several-hosts, by the validators of what they are for, where these are installed."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import typer.main

import kogpt_jax
from kogpt_jax import KoGPT, cli

_ROOT = pathlib.Path(kogpt_jax.__file__).parents[1]
_FOLDER = _ROOT / "docs" / "several-hosts"
_PROMPT = "배우들의 연기가"


def _slurm_problem() -> str | None:
    """Why no job can be tried. A controller with two nodes of eight GPUs each is needed; they need not exist."""
    if shutil.which("sbatch") is None:
        return "Slurm is not installed"
    done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    return None if done.returncode == 0 else f"no Slurm controller answers: {done.stdout or done.stderr}"


_SLURM_PROBLEM = _slurm_problem()


@pytest.mark.skipif(_SLURM_PROBLEM is not None, reason=str(_SLURM_PROBLEM))
def test_slurm_takes_the_batch_script():
    command = ["sbatch", "--test-only"]
    taken = subprocess.run([*command, _FOLDER / "kogpt.sbatch"], capture_output=True, text=True, timeout=60)
    assert taken.returncode == 0, taken.stderr
    refused = subprocess.run(
        [*command, "--gpus-per-node=9999", _FOLDER / "kogpt.sbatch"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0


@pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None, reason="kubernetes-validate is not installed"
)
def test_kubernetes_takes_the_manifest(tmp_path):
    def validate(path: pathlib.Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    taken = validate(_FOLDER / "kogpt.yaml")
    assert taken.returncode == 0, taken.stderr
    text = (_FOLDER / "kogpt.yaml").read_text("utf-8")
    (tmp_path / "wrong.yaml").write_text(text.replace("completionMode: Indexed", "completionMode: [1]"), "utf-8")
    assert validate(tmp_path / "wrong.yaml").returncode != 0


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.slow
def test_the_ray_script_writes_the_text_of_one_process():
    text = KoGPT.from_pretrained("demo").generate(_PROMPT)[0].text
    command = [sys.executable, str(_FOLDER / "kogpt_ray.py"), "--mesh", "d1p1t2", "--actors", "2", "--prompt", _PROMPT]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{_PROMPT}{text}" in done.stdout.splitlines()


def test_the_batch_script_is_one_of_bash():
    subprocess.run(["bash", "-n", _FOLDER / "kogpt.sbatch"], check=True, timeout=60)


@pytest.mark.parametrize("name", ["kogpt.sbatch", "kogpt.yaml"])
def test_the_options_are_those_of_the_command(name):
    """Validators know nothing of `kogpt generate`."""
    _, options = re.split(r"kogpt generate|\[kogpt, generate\]", (_FOLDER / name).read_text("utf-8"))
    options = options.split("env:")[0]
    used = set(re.findall(r"--[a-z-]+", options))
    command = typer.main.get_command(cli.app).commands["generate"]  # type: ignore[attr-defined]
    assert {"--model", "--mesh", "--coordinator"} <= used
    assert used <= {option for parameter in command.params for option in parameter.opts}
