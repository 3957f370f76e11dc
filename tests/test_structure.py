"""The layout's own rules: what may import what, and what may stand in one module only."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import custom_ops
import kogpt_jax

PACKAGE = pathlib.Path(kogpt_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
OPS_PACKAGE = pathlib.Path(custom_ops.__file__).parent
OPS_FILES = sorted(OPS_PACKAGE.rglob("*.py"))

# A module imports only what stands above it. A module that is not listed has no place yet: give it one.
ORDER = (
    "_version",
    "errors",
    "json_files",
    "environment",
    "progress",
    "config",
    "sharding",
    "packing",
    "runtime",
    "distributed",
    "collectives",
    "vocabulary",
    "kv_cache",
    "nan_guard",
    "ops",
    "quantize",
    "model",
    "sampling",
    "pipeline",
    "decoding",
    "weight_files",
    "checkpoint",
    "tokenizer",
    "text_files",
    "smoothing",
    "quantized_cache",
    "demo",
    "demo.data",
    "demo.export",
    "demo.train",
    "engine",
    "",  # the package itself, which re-exports
    "text_rows",
    "tuning",
    "evaluation",
    "info",
    "cli",
    "__main__",
)
HF_NAMES = re.compile(
    r"\b([qkv]_proj|out_proj|fc_in|fc_out|wte|ln_1|masked_bias)\b|transformer\.h\b|\b(lm_head|ln_f)\.(weight|bias)\b"
)


def module_name(path: pathlib.Path) -> str:
    """``"demo.train"`` for kogpt_jax/demo/train.py, ``""`` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, importer: str) -> set[str]:
    """The package's modules that a source imports, anywhere in it, functions and type-checking blocks included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole.removeprefix("kogpt_jax.") in ORDER else str(node.module))
    return {name.removeprefix("kogpt_jax").removeprefix(".") for name in names if name.split(".")[0] == "kogpt_jax"}


def layout_problems(importer: str, source: str) -> list[str]:
    """Which imports of a module point downwards."""
    if importer not in ORDER:
        return [f"{importer} has no place in ORDER"]
    imported = imported_modules(source, importer)
    return [
        f"{importer} imports {name}"
        for name in sorted(imported)
        if name not in ORDER or ORDER.index(name) >= ORDER.index(importer)
    ]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_upwards(path):
    assert layout_problems(module_name(path), path.read_text(encoding="utf-8")) == []


def test_custom_ops_stand_alone():
    sources = {path.name: path.read_text(encoding="utf-8") for path in OPS_FILES}
    assert {name for name, source in sources.items() if imported_modules(source, name)} == set()


def test_environment_variables_are_read_in_one_place():
    holders = [path for path in FILES + OPS_FILES if re.search(r"\bos\.(environ|getenv)", path.read_text("utf-8"))]
    assert holders == [PACKAGE / "runtime.py"]


def test_xla_headers_stand_in_the_bindings_only():
    sources = [path for path in (OPS_PACKAGE / "csrc").iterdir() if '#include "xla/' in path.read_text("utf-8")]
    assert {path.name for path in sources} <= {"ffi_helpers.h", "library.cc"}


@pytest.mark.parametrize(
    "source",
    [
        "from kogpt_jax import engine",
        "import kogpt_jax.engine",
        "from kogpt_jax.engine import KoGPT",
        "import kogpt_jax",
        "from kogpt_jax import KoGPT",
        "def f():\n    from kogpt_jax.decoding import prefill",
        "from kogpt_jax.nowhere import something",
    ],
)
def test_an_import_that_points_downwards_is_found(source):
    assert len(layout_problems("model", source)) == 1
    assert layout_problems("model", "import kogpt_jax.config\nfrom kogpt_jax import kv_cache, sharding") == []
    assert layout_problems("unheard_of", "") != []


def test_hugging_face_weight_names_stand_in_the_checkpoint_table_only():
    holders = {module_name(path) for path in FILES if HF_NAMES.search(path.read_text(encoding="utf-8"))}
    assert holders == {"checkpoint"}


@pytest.mark.parametrize(
    "word", [r"jax\.experimental", r"\bpjit\b", r"jax\._src", r"\bnnx\.jit\b", "custom_partitioning"]
)
def test_nothing_deprecated_or_private_of_jax(word):
    assert [str(path) for path in FILES + OPS_FILES if re.search(word, path.read_text(encoding="utf-8"))] == []


def test_jit_and_shard_map_surround_the_forward_in_decoding_only():
    holders = {module_name(path) for path in FILES if "shard_map(" in path.read_text(encoding="utf-8")}
    assert holders - {"demo.train"} == {"decoding"}


def test_public_names():
    assert len(set(kogpt_jax.__all__)) == len(kogpt_jax.__all__)
    assert [name for name in kogpt_jax.__all__ if not hasattr(kogpt_jax, name)] == []


def test_importing_the_package_starts_no_backend():
    """Settings must be made before the first operation, so an import alone must not be one."""
    code = "import kogpt_jax, jax._src.xla_bridge as bridge; print(bridge.backends_are_initialized())"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert completed.stdout == "False\n"
