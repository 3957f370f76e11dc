"""Set-up of a test run: the device, the cache folder, and what a run that asks for a GPU or the oracle must have."""

import importlib
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Shapes, dtypes and types of every signature are checked, in tests only. Before the package's first import. The ops
# themselves (custom_ops.linear and others) are not among them: they check their own arguments, and tests see how.
_CHECKED = [
    "custom_ops._library",
    "custom_ops.pages",
    "custom_ops.quantization",
    "custom_ops.rotary",
    "custom_ops.semaphores",
    "kogpt_jax",
]
jaxtyping.install_import_hook(_CHECKED, "typechecking.check")

# Compiling inside an example is slow the first time, and the same examples in every run keep CI reproducible.
hypothesis.settings.register_profile("kogpt", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("kogpt")

# For tests of meshes; all others run on the first.
_NUM_CPU_DEVICES = 8

_MUST_RUN = ("gpu", "multigpu", "oracle")
_cache_folder = pytest.StashKey[pathlib.Path]()
_left_out = pytest.StashKey[str]()


def _selects(config: pytest.Config, marker: str) -> bool:
    """Whether ``-m`` asks for tests with this marker: it names it without ``not``, or it is empty."""
    expression = config.getoption("markexpr")
    return not expression or re.search(rf"(?<!not )\b{marker}\b", expression) is not None


def pytest_configure(config: pytest.Config) -> None:
    # JAX reads JAX_PLATFORMS when it is imported, which is later: this file and the plugins leave that to the tests.
    if not (_selects(config, "gpu") or _selects(config, "multigpu")):
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_NUM_CPU_DEVICES"] = str(_NUM_CPU_DEVICES)
    if _selects(config, "multigpu"):
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # as `runtime.configure` has it for several devices
    # Neither this process nor the ones that tests start touch the user's own cache; within a run they share one.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kogpt-test-cache-"))
    config.stash[_cache_folder] = folder
    os.environ["KOGPT_CACHE_DIR"] = str(folder)
    if _selects(config, "oracle"):
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise pytest.UsageError(f"-m oracle needs {package}: pip install .[oracle], or make oracle")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _cache_folder in config.stash:
        shutil.rmtree(config.stash[_cache_folder], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module() -> Iterator[None]:
    """Lets go of the compiled programs after each module: on a CPU one takes dozens of memory maps, and a process has
    65,530 of them on Linux before XLA crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of the Host library where there is none (no compiler), unless ``-m`` asks for them."""
    of_host = [item for item in items if item.get_closest_marker("host") and not _needs_gpu(item)]
    if not of_host or _selects(config, "host"):
        return
    from custom_ops import library_info

    problem = next(library.problem for library in library_info() if library.name == "host")
    if problem is not None:
        items[:] = [item for item in items if item not in of_host]
        config.hook.pytest_deselected(items=of_host)
        config.stash[_left_out] = f"{len(of_host)} tests of the Host library are left out: {problem}"


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    return config.stash.get(_left_out, "")


def _needs_gpu(item: pytest.Item) -> bool:
    """Marked for a GPU as well: such a test takes the CUDA library."""
    return any(map(item.get_closest_marker, ("gpu", "multigpu")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed:
        import jax

        found = jax.device_count() if jax.default_backend() == "gpu" else 0
        if found < needed:
            pytest.fail(f"needs {needed} GPU(s), JAX sees {found}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """A test that was asked for by its marker and skipped itself has shown nothing: that is a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and any(map(item.get_closest_marker, _MUST_RUN)):
        report.outcome = "failed"
        report.longrepr = f"skipped in a run that asked for it: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _runtime() -> None:
    """The compilation cache is on from the first test, whichever that is."""
    from kogpt_jax import runtime

    runtime.configure()


@pytest.fixture
def import_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script of benchmarks/ by its name, which sees the others there."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module
