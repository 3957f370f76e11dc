"""`custom_ops.autotune`: what is right, what a file says, and what becomes of a file that cannot be used."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import stat
import types
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

import custom_ops
from custom_ops import _library, autotune, timing, tolerance
from custom_ops.autotune import Candidate, Choice, Device, Key, Timing
from custom_ops.quantization import QuantizedArray, quantize_weight

BF16 = jnp.bfloat16
DEVICE = Device("NVIDIA H100 80GB HBM3", "0123456789abcdef")
TILES = ("64x256 pingpong swizzle 1", "128x256 swizzle 1", "128x256 swizzle 8")
KEY = Key("mixed_gemm", "bfloat16", 24, 32, 128)
ENTRY = (Timing(Choice("ffi", TILES[2]), 10.5), Timing(Choice("reference"), 20), Timing(Choice("ffi", TILES[0]), 30.25))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """The user's files lie here, shipped ones beside them, nothing is known and nothing has been told."""
    monkeypatch.setattr(autotune, "_user_folder", tmp_path / "user")
    monkeypatch.setattr(autotune, "_SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(autotune, "_told", set())
    autotune._load_table.cache_clear()
    return tmp_path


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine with a GPU and a library that has tiles, as far as Python sees."""
    tiles = {"int8_gemm": TILES[:2], "mixed_gemm": TILES}
    library = _library.LibraryInfo("cuda", "lib.so", problem=None, gemm_hash="0", tiles=tiles)
    monkeypatch.setattr(_library, "load", lambda platform: library)
    monkeypatch.setattr(autotune, "find_device", lambda platform: DEVICE)


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- Measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def product():
    """(reference, weights): a product in bf16 with GELU for 16 of 24 outputs."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(9, 32)), BF16)
    bias = jnp.asarray(rng.normal(size=16), BF16)
    weights = [quantize_weight(jnp.asarray(rng.normal(size=(24, 32)) / 6, jnp.float32)) for _ in range(2)]

    def reference(weight, dtype=BF16, before=0.0):
        weight = QuantizedArray(weight.qvalue, weight.scale + before)
        options = {"residual": None, "gelu_from": 8, "act_dim": 20, "out_dtype": None}
        return custom_ops.mixed_gemm_reference(x.astype(dtype), weight, bias=bias.astype(dtype), **options)

    return reference, weights


def tune(product, *candidates):
    reference, weights = product
    return autotune.tune(
        candidates,
        weights,
        reference=reference,
        oracle=lambda weight: reference(weight, jnp.float32),
        num_gelu=16,
        turns=2,
        rounds=2,
    )


def right(product, name):
    return Candidate(Choice(name), lambda before, weight: product[0](weight, before=before))


def wrong(product, name, change):
    return Candidate(Choice(name), lambda before, weight: change(*product[0](weight, before=before)))


def test_a_right_candidate_is_timed(product):
    outcome = tune(product, right(product, "a"))
    (timed,) = outcome.timings
    assert timed.choice == Choice("a")
    assert 0 < timed.us == outcome.us(Choice("a")) < 1e6
    assert outcome.rejected == ()
    assert outcome.us(Choice("b")) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y, act: (y * 1.05, act), "error 0.0"),
        (lambda y, act: (y, act * 1.05), "error 0.0"),
        (lambda y, act: (y, act.at[8, 19].set(jnp.nan)), "error nan"),
        (lambda y, act: (jnp.full_like(y, 0.5), act), "allowed 0.0"),
        (lambda y, act: (y[:4], act[:4]), "shape (4, 8) instead of (9, 8)"),
    ],
    ids=["y", "act", "nan", "constant", "shape"],
)
def test_a_wrong_candidate_is_rejected(product, change, reason):
    outcome = tune(product, wrong(product, "wrong", change), right(product, "right"))
    assert [timed.choice for timed in outcome.timings] == [Choice("right")]
    ((choice, why),) = outcome.rejected
    assert choice == Choice("wrong")
    assert reason in why


def test_columns_that_are_not_gelus_do_not_count(product):
    outcome = tune(product, wrong(product, "a", lambda y, act: (y, act.at[:, :4].set(jnp.nan))))
    assert outcome.rejected == ()


def test_a_candidate_that_cannot_run_is_rejected(product):
    def fail(before, weight):
        raise ValueError("K must be a multiple of 64\nand more")

    outcome = tune(product, Candidate(Choice("a"), fail), right(product, "b"))
    assert outcome.rejected == ((Choice("a"), "K must be a multiple of 64"),)
    assert [timed.choice for timed in outcome.timings] == [Choice("b")]


def test_the_wrong_one_is_the_fastest_and_the_next_best_is_taken(product, monkeypatch):
    """Each program takes as long as it says, and the median of its rounds counts."""
    told = {"slow": iter([3.0, 2.0]), "slower": iter([6.0, 1.0]), "quick": iter([0.1, 0.1])}
    names = {}
    make_step, compile_rotation = autotune._step, timing.compile_rotation

    def named_step(candidate):
        step = make_step(candidate)
        names[step] = candidate.choice.implementation
        return step

    def compile_told(step, operands, *, turns):
        rotation = compile_rotation(step, operands, turns=turns)
        return types.SimpleNamespace(results=rotation.results, sample=lambda: next(told[names[step]]))

    monkeypatch.setattr(autotune, "_step", named_step)
    monkeypatch.setattr(timing, "compile_rotation", compile_told)
    quick = wrong(product, "quick", lambda y, act: (jnp.ones_like(y), jnp.ones_like(act)))
    outcome = tune(product, right(product, "slow"), quick, right(product, "slower"))
    assert outcome.timings == (Timing(Choice("slow"), 2.5), Timing(Choice("slower"), 3.5))
    assert [choice for choice, _ in outcome.rejected] == [Choice("quick")]


def test_nothing_is_right(product):
    assert tune(product, wrong(product, "a", lambda y, act: (-y, act))).timings == ()


def test_the_rotation_calls_a_step_for_each_weight_and_turn():
    """The sum that the calls hand on shows how many there were: none is left out."""
    seen = []

    def step(before, weight):
        jax.debug.callback(lambda value: seen.append(float(value)), weight[0, 0])
        return timing.with_next(weight + before)

    rotation = timing.compile_rotation(step, [jnp.full((1, 1), number, jnp.float32) for number in (1, 2, 3)], turns=4)
    assert rotation.sample() > 0
    jax.effects_barrier()
    assert sorted(seen) == sorted([1.0, 2.0, 3.0] * 4)
    (result,) = rotation.results()
    assert result.tolist() == [[1.0]]  # of the first operands: what went before changes nothing


def test_the_error_is_that_of_the_tests():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(5, 7)).astype(np.float32)
    actual = (expected + 0.01 * rng.normal(size=(5, 7))).astype(np.float32)
    error = float(tolerance.relative_error(jnp.asarray(actual), jnp.asarray(expected)))
    assert error == pytest.approx(tolerances.relative_error(actual, expected), rel=1e-5)
    assert float(tolerance.relative_error(jnp.zeros((1, 2)), jnp.zeros((1, 2)))) == 0
    assert float(tolerance.relative_error(jnp.ones((1, 2)), jnp.zeros((1, 2)))) == np.inf
    assert np.isnan(float(tolerance.relative_error(jnp.full((1, 2), jnp.nan), jnp.ones((1, 2)))))


# -- Looking up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (64, 64), (65, 128), (2040, 2048), (8192, 8192)])
def test_rows_are_rounded_up_to_a_power_of_two(rows, bucket):
    assert Key.of("int8_gemm", BF16, 24, 32, rows) == Key("int8_gemm", "bfloat16", 24, 32, bucket)


@pytest.mark.usefixtures("gpu")
def test_the_fastest_tile_is_found(caplog):
    autotune.save(DEVICE, {KEY: ENTRY})
    assert [autotune.tile_index("mixed_gemm", BF16, 24, 32, rows) for rows in (65, 100, 128)] == [2, 2, 2]
    assert messages(caplog) == []


@pytest.mark.usefixtures("gpu")
def test_a_tile_that_the_library_does_not_have_is_passed_over():
    entry = (Timing(Choice("ffi", "256x256 swizzle 3"), 1), *ENTRY)
    autotune.save(DEVICE, {KEY: entry})
    assert autotune.tile_index("mixed_gemm", BF16, 24, 32, 100) == 2


@pytest.mark.usefixtures("gpu")
def test_a_missing_entry_is_told_once(caplog):
    autotune.save(DEVICE, {KEY: ENTRY})
    for arguments in [
        ("mixed_gemm", BF16, 24, 32, 64),
        ("mixed_gemm", BF16, 24, 32, 33),
        ("mixed_gemm", BF16, 8, 32, 40),
    ]:
        assert autotune.tile_index(*arguments) == autotune.TILE_BY_SHAPE
    (message,) = messages(caplog)
    for part in ("mixed_gemm", "64 rows", "bfloat16", "24 outputs", "K 32", "kogpt autotune"):
        assert part in message
    assert autotune.tile_index("mixed_gemm", BF16, 24, 32, 400) == autotune.TILE_BY_SHAPE
    assert autotune.tile_index("int8_gemm", BF16, 24, 32, 64) == autotune.TILE_BY_SHAPE
    assert len(messages(caplog)) == 3


@pytest.mark.usefixtures("gpu")
def test_where_there_is_one_tile_nothing_is_looked_up(monkeypatch, caplog):
    library = dataclasses.replace(_library.load("gpu"), tiles={"mixed_gemm": ("128x128",)})
    monkeypatch.setattr(_library, "load", lambda platform: library)
    for op in ("mixed_gemm", "int8_gemm"):
        assert autotune.tile_index(op, BF16, 24, 32, 64) == autotune.TILE_BY_SHAPE
    assert messages(caplog) == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("tile", "expected"), [(None, 2), (-1, -1), (1, 1)])
@pytest.mark.parametrize("op", ["int8_gemm", "mixed_gemm"])
def test_the_tile_reaches_the_call(op, tile, expected):
    entries = {dataclasses.replace(KEY, op=name): ENTRY for name in ("int8_gemm", "mixed_gemm")}
    autotune.save(DEVICE, entries)
    weight = QuantizedArray(jnp.ones((24, 32), jnp.int8), jnp.ones((24, 1)))
    x = (
        QuantizedArray(jnp.ones((100, 32), jnp.int8), jnp.ones((100, 1)))
        if op == "int8_gemm"
        else jnp.ones((100, 32), BF16)
    )
    options = {"dtype": BF16} if op == "int8_gemm" else {}

    def call(x, weight):
        return getattr(custom_ops, op)(x, weight, tile=tile, implementation="ffi", **options)[0]

    (equation,) = [eqn for eqn in jax.make_jaxpr(call)(x, weight).eqns if eqn.primitive.name == "ffi_call"]
    assert equation.params["target_name"] == f"kogpt_{op}"
    expected = 0 if (op, tile) == ("int8_gemm", None) else expected  # which has not got the third tile
    assert dict(equation.params["attributes"])["tile"] == np.int64(expected)


@pytest.mark.usefixtures("gpu")
def test_one_implementation_serves_all_rows(caplog):
    """The one with the least time over both products, each number of rows counting alike."""
    shapes, usable = [(24, 32), (8, 48)], ("reference", "ffi", "linear")

    def fastest() -> str | None:
        return autotune.fastest_implementation("gpu", "mixed_gemm", BF16, shapes, usable)

    def save(rows: int, **times: tuple[float, float]) -> None:
        for number, (outputs, k_dim) in enumerate(shapes):
            entry = tuple(Timing(Choice(name), both[number]) for name, both in times.items())
            autotune.save(DEVICE, {Key.of("mixed_gemm", BF16, outputs, k_dim, rows): entry})

    assert fastest() is None
    assert len(messages(caplog)) == 1
    save(64, reference=(10, 10), linear=(1, 4))
    assert fastest() == "linear"
    save(1024, reference=(100, 100), linear=(300, 420), ffi=(100, 60))
    assert fastest() == "reference"  # 4 and 1.25 times the fastest; linear 1 and 4.5; ffi cannot run 64 rows
    assert autotune.fastest_implementation("gpu", "mixed_gemm", BF16, shapes, usable, above=64) == "ffi"
    save(64, reference=(10, 10), linear=(1, 4), ffi=(2, 4))
    assert fastest() == "ffi"
    assert autotune.fastest_implementation("gpu", "mixed_gemm", BF16, shapes, usable[:1]) == "reference"
    assert autotune.fastest_implementation("gpu", "mixed_gemm", jnp.float16, shapes, usable) is None
    assert autotune.fastest_implementation("gpu", "mixed_gemm", BF16, [(24, 32), (9, 48)], usable) is None
    assert len(messages(caplog)) == 1


# -- Files ------------------------------------------------------------------------------------------------------------


def write(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """A file as `save` makes it, with other values in place of some."""
    path = autotune.save(DEVICE, {KEY: ENTRY})
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    autotune._load_table.cache_clear()
    return path


def test_a_file_is_read_as_it_was_written(folder, caplog):
    path = autotune.save(DEVICE, {KEY: ENTRY})
    assert path == folder / "user" / "nvidia-h100-80gb-hbm3.json"
    assert autotune.read_table(path, DEVICE) == {KEY: ENTRY}
    content = json.loads(path.read_text(encoding="utf-8"))
    assert {name: content[name] for name in ("format_version", "name", "gemm_hash")} == {
        "format_version": autotune.FORMAT_VERSION,
        "name": DEVICE.name,
        "gemm_hash": "0123456789abcdef",
    }
    assert autotune.read_table(folder / "none.json", DEVICE) == {}
    assert messages(caplog) == []


def entry(**changes: object) -> dict[str, object]:
    candidates = [{"implementation": "ffi", "tile": TILES[0], "us": 2.5}]
    return {**dataclasses.asdict(KEY), "candidates": candidates} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": autotune.FORMAT_VERSION + 1}, "its format_version is 3, not 2"),
        ({"name": "NVIDIA H200"}, "its name is 'NVIDIA H200', not 'NVIDIA H100 80GB HBM3'"),
        ({"gemm_hash": "fedcba"}, "its gemm_hash is 'fedcba', not '0123456789abcdef'"),
        ({"gemm_hash": None}, "its gemm_hash is None"),
        ({"entries": None}, ""),
        ({"entries": [{"op": "mixed_gemm"}]}, "it has no 'dtype'"),
        ({"entries": [entry(rows=100)]}, "rows a power of two"),
        ({"entries": [entry(k_dim="32")]}, "positive integers"),
        ({"entries": [entry(op=5)]}, "op and dtype must be names, got 5"),
        (
            {"entries": [entry(candidates=[{"implementation": "ffi", "tile": None, "us": -1}])]},
            "positive number, got -1",
        ),
        ({"entries": [entry(candidates=[{"implementation": "ffi", "tile": 3, "us": 1}])]}, "must be names"),
        ({"entries": [entry(candidates=[{"implementation": "ffi", "us": 1}])]}, "it has no 'tile'"),
        ({"entries": [entry(candidates=[{"implementation": "ffi", "tile": None, "us": float("nan")}])]}, "got nan"),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_one_line(folder, changes, reason, caplog, monkeypatch):
    path = write(folder, **changes)
    monkeypatch.setattr(autotune, "find_device", lambda platform: DEVICE)
    assert [autotune.load_table("gpu"), autotune.load_table("gpu")] == [{}, {}]
    (message,) = messages(caplog)  # and once a process
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b"\xff\xfe",
        b"no JSON",
        b"[" * 200_000,
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-3],
        lambda whole: whole.replace(b"20", b"two"),
    ],
    ids=["empty", "brace", "list", "null", "number", "UTF-16", "text", "nested", "half", "cut off", "damaged"],
)
def test_a_corrupt_file_is_ignored_with_one_line(folder, content, caplog):
    path = write(folder)
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    assert autotune.read_table(path, DEVICE) == {}
    (message,) = messages(caplog)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.usefixtures("gpu")
def test_a_file_that_cannot_be_used_changes_nothing_but_the_tile(folder, caplog):
    write(folder, gemm_hash="other")
    assert autotune.tile_index("mixed_gemm", BF16, 24, 32, 100) == autotune.TILE_BY_SHAPE
    assert len(messages(caplog)) == 2  # the file, and what is missing now


@pytest.mark.usefixtures("gpu")
def test_the_users_entries_win_over_shipped_ones(folder):
    other = dataclasses.replace(KEY, rows=256)
    shipped = autotune.save(DEVICE, {KEY: (Timing(Choice("ffi", TILES[1]), 5),), other: ENTRY})
    shipped.rename(folder / "shipped.json")
    (folder / "shipped").mkdir()
    (folder / "shipped.json").rename(folder / "shipped" / shipped.name)
    autotune._load_table.cache_clear()
    assert autotune.tile_index("mixed_gemm", BF16, 24, 32, 128) == 1
    autotune.save(DEVICE, {KEY: ENTRY})
    assert autotune.tile_index("mixed_gemm", BF16, 24, 32, 128) == 2
    assert autotune.tile_index("mixed_gemm", BF16, 24, 32, 256) == 2


def test_saving_adds_to_the_file_and_replaces_it_whole(folder, monkeypatch):
    path = autotune.save(DEVICE, {KEY: ENTRY})
    other = dataclasses.replace(KEY, rows=256)
    assert autotune.save(DEVICE, {other: ENTRY[:1]}) == path
    assert autotune.read_table(path, DEVICE) == {KEY: ENTRY, other: ENTRY[:1]}
    autotune.save(DEVICE, {KEY: ENTRY[1:2]})
    assert autotune.read_table(path, DEVICE)[KEY] == ENTRY[1:2]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    before = path.read_bytes()

    def fail(source, target):
        assert json.loads(pathlib.Path(source).read_text(encoding="utf-8"))["entries"]  # whole before it is renamed
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        autotune.save(DEVICE, {other: ENTRY})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]  # nothing is left of the attempt


def test_a_file_of_other_kernels_is_replaced(folder):
    path = autotune.save(dataclasses.replace(DEVICE, gemm_hash="old"), {KEY: ENTRY})
    before = path.read_bytes()
    assert autotune.save(DEVICE, {}) == path  # a try
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    other = dataclasses.replace(KEY, rows=256)
    assert autotune.save(DEVICE, {other: ENTRY}) == path
    assert autotune.read_table(path, DEVICE) == {other: ENTRY}


def test_without_a_folder_nothing_is_saved(monkeypatch):
    autotune.set_user_folder(None)
    with pytest.raises(ValueError, match="set_user_folder"):
        autotune.save(DEVICE, {KEY: ENTRY})


def digest(text: str, files: Iterable[pathlib.Path]) -> str:
    """As csrc/CMakeLists.txt has it."""
    lines = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in sorted(files)]
    return hashlib.sha256(f"{text}\n{''.join(lines)}".encode()).hexdigest()[:16]


def test_shipped_files_are_what_the_command_writes_for_todays_kernels():
    """Whoever changes the sources of products of many rows measures again, or takes the files away."""
    package = pathlib.Path(custom_ops.__file__).parent
    sources = [path for pattern in ("*gemm*.cu", "*gemm*.cuh") for path in package.glob(f"csrc/{pattern}")]
    gemm_hash = digest("gemm", [path for path in sources if not re.search("_(driver|rivals)", path.name)])
    assert (package / "tuned" / "README.md").is_file()
    for path in (package / "tuned").glob("*.json"):
        device = Device(json.loads(path.read_text(encoding="utf-8"))["name"], gemm_hash)
        assert path.name == autotune.file_name(device)
        assert autotune.read_table(path, device)


@pytest.mark.host
def test_the_cpu_is_named_by_its_model_and_cores(monkeypatch, tmp_path):
    device = autotune.find_device("cpu")
    host = custom_ops.library_info()[0]
    assert device is not None
    assert device.gemm_hash == host.gemm_hash == host.source_hash
    assert device.name == autotune._cpu_name()
    (tmp_path / "cpuinfo").write_text("flags\t: a b\nmodel name\t: Some CPU @ 2 GHz\n", encoding="utf-8")
    monkeypatch.setattr(autotune, "_CPU_INFO", tmp_path / "cpuinfo")
    assert autotune._cpu_name.__wrapped__() == f"Some CPU @ 2 GHz, {os.cpu_count()} cores"
    monkeypatch.setattr(autotune, "_CPU_INFO", tmp_path / "none")
    assert f", {os.cpu_count()} cores" in autotune._cpu_name.__wrapped__()


def test_there_is_no_device_without_a_library(monkeypatch):
    monkeypatch.setattr(_library, "load", lambda platform: _library.LibraryInfo("cuda", problem="it was not built"))
    assert autotune.find_device("gpu") is None
    assert autotune.load_table("gpu") == {}
