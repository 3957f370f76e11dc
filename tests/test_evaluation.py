"""Perplexity in every mode: which tokens count, what is compared, what a second run takes from the first."""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import hypothesis
import numpy as np
import pytest
import small_model
from hash_weights import write_checkpoint
from hypothesis import strategies
from small_model import KERNEL_CONFIG, log_softmax

from kogpt_jax import KoGPT, evaluation, quantized_cache
from kogpt_jax.errors import InputError
from kogpt_jax.evaluation import MODES, PerplexityTask, measure_perplexity, sliding_windows

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
EOS = 256
TEXT = "나는 오늘 학교에 갔다.\nThe quick brown fox.\n\n이 영화는 정말 재미있다!\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("measured")
    write_checkpoint(directory, KERNEL_CONFIG.to_hf_dict(), salt="kernels")
    small_model.write_byte_tokenizer(directory / "tokenizer.json")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def _cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_cache, "directory", lambda: tmp_path / "quantized")


def task_of(directory: pathlib.Path, **options: Any) -> PerplexityTask:
    defaults: dict[str, Any] = {"model": str(directory), "text": directory / "text.txt", "dtype": "fp32"}
    return PerplexityTask(**defaults | options)


# -- Windows ----------------------------------------------------------------------------------------------------------


def test_the_example_of_the_docstring():
    first, second = sliding_windows([10, 11, 12, 13, 14, 15], 4, 2)
    assert (first.token_ids, first.first_target) == ([10, 11, 12, 13], 1)
    assert (second.token_ids, second.first_target) == ([12, 13, 14, 15], 2)
    assert sliding_windows([10], 4, 2) == []


@hypothesis.given(strategies.integers(0, 60), strategies.integers(2, 12), strategies.data())
def test_every_token_but_the_first_counts_once(length, window, data):
    stride = data.draw(strategies.integers(1, window - 1))
    counted = []
    for part in sliding_windows(list(range(length)), window, stride):
        assert len(part.token_ids) <= window
        for index in range(part.first_target, len(part.token_ids)):
            position = part.token_ids[index]
            assert index >= min(position, window - stride)
            counted.append(position)
    assert counted == list(range(1, length))


@pytest.mark.parametrize("per_line", [False, True])
def test_perplexity_by_hand(directory, per_line):
    """Token by token from the logits of a text that is its context."""
    window, stride = 24, 7
    result = measure_perplexity(task_of(directory, window=window, stride=stride, per_line=per_line), ["fp32"])
    engine = KoGPT.from_pretrained(directory, dtype="fp32")
    texts = [line for line in TEXT.split("\n") if line] if per_line else [TEXT]
    documents = [list(text.encode()) for text in texts]
    documents = [[EOS, *ids, EOS] if per_line else ids for ids in documents]
    nats = []
    for ids in documents:
        for position in range(1, len(ids)):
            start = 0 if position < window else (position - window) // stride * stride + stride
            logits = engine.logits(ids[start:position])[-1]
            nats.append(-log_softmax(logits)[ids[position]])
    for phase in ("prefill", "decode"):
        figures = result["modes"]["fp32"][phase]
        assert figures["tokens"] == len(nats) == result["settings"]["tokens"]
        assert figures["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
        assert abs(figures["perplexity_percent_more"]) < 1e-3
        assert figures["logit_error"] < 1e-5
        assert figures["agreement"] == 1


# -- Modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mode_is_compared_with_fp32(directory):
    """Logit error, agreement and change of one window, from the engines' own logits."""
    result = measure_perplexity(task_of(directory, max_documents=1, per_line=True), ["w8a8", "fp32"])
    ids = [EOS, *TEXT.split("\n")[0].encode(), EOS]
    exact = KoGPT.from_pretrained(directory, dtype="fp32").logits(ids)[:-1]
    logits = KoGPT.from_pretrained(directory, dtype="fp32", quant="w8a8").logits(ids)[:-1]
    nats = {}
    for name, values in (("exact", exact), ("w8a8", logits)):
        nats[name] = -log_softmax(values)[np.arange(len(ids) - 1), ids[1:]].mean()
    figures = result["modes"]["w8a8"]["prefill"]
    error = np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))
    # Padding makes other sums, and an activation between two integers may be rounded to either.
    assert figures["logit_error"] == pytest.approx(error, rel=1e-2)
    assert figures["logit_error"] > 1e-3
    assert figures["agreement"] == np.mean(logits.argmax(axis=-1) == exact.argmax(axis=-1))
    assert figures["perplexity"] == pytest.approx(math.exp(nats["w8a8"]), rel=1e-4)
    more = 100 * (math.exp(nats["w8a8"] - nats["exact"]) - 1)
    assert figures["perplexity_percent_more"] == pytest.approx(more, abs=1e-2)
    # Steps have 16-bit activations.
    assert 0 < result["modes"]["w8a8"]["decode"]["logit_error"] < figures["logit_error"]


@pytest.mark.slow
def test_outliers_cost_w8a8_dearly_and_smoothing_undoes_that(directory):
    task = task_of(directory, per_line=True, outliers=60.0, calibration=directory / "text.txt")
    result = measure_perplexity(task, ["fp32", "w8a8", "w8a8-smoothed"])
    errors = {name: phases["prefill"]["logit_error"] for name, phases in result["modes"].items()}
    print(errors)
    assert errors["fp32"] == 0  # against itself: that adding them keeps the function, test_smoothing.py shows
    assert errors["w8a8"] > 3 * errors["w8a8-smoothed"]
    assert "outliers (x60, function-preserving)" in evaluation.heading(result)
    plain = measure_perplexity(task_of(directory, per_line=True), ["fp32"])
    assert "outliers" not in evaluation.heading(plain)
    for phase in ("prefill", "decode"):
        perplexities = [found["modes"]["fp32"][phase]["perplexity"] for found in (result, plain)]
        assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)


def test_a_mode_that_is_not_finite_is_an_error(directory, monkeypatch):
    logits = evaluation._logits
    monkeypatch.setattr(evaluation, "_logits", lambda *arguments: logits(*arguments) * np.inf)
    with pytest.raises(FloatingPointError, match="mode bf16: the logits are not finite"):
        measure_perplexity(task_of(directory), ["bf16"])


# -- A run that goes on -----------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modes that are measured from now on."""
    names: list[str] = []
    measure = evaluation._measure

    def watched(name, *arguments):
        names.append(name)
        if name == "fp16":
            raise KeyboardInterrupt
        return measure(name, *arguments)

    monkeypatch.setattr(evaluation, "_measure", watched)
    return names


def test_finished_modes_are_kept(directory, tmp_path, measured):
    file = tmp_path / "out.json"
    told: list[str] = []
    task = task_of(directory)
    with pytest.raises(KeyboardInterrupt):
        measure_perplexity(task, ["fp32", "fp16"], file, tell=told.append)
    kept = json.loads(file.read_text())
    assert list(kept["modes"]) == ["fp32"]
    result = measure_perplexity(task, ["bf16", "fp32"], file, tell=told.append)
    assert measured == ["fp32", "fp16", "bf16"]
    assert result == json.loads(file.read_text())
    assert result["modes"]["fp32"] == kept["modes"]["fp32"]
    assert [row[:2] for row in evaluation.table_rows(result)] == [
        (name, phase) for name in ("fp32", "bf16") for phase in ("prefill", "decode")
    ]
    assert told == [f"taken from {file}: fp32"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("changed", ["stride", "outliers", "text", "environment", "weights"])
def test_other_settings_start_anew(directory, tmp_path, measured, monkeypatch, changed):
    file = tmp_path / "out.json"
    told: list[str] = []
    measure_perplexity(task_of(directory), ["fp32"], file, tell=told.append)
    task = task_of(directory)
    if changed == "text":
        other = tmp_path / "text.txt"
        other.write_text(TEXT + "!", encoding="utf-8")
        task = dataclasses.replace(task, text=other)
    elif changed == "environment":
        monkeypatch.setattr(evaluation, "environment", lambda: {"commit": "another", "device": "cpu"})
    elif changed == "weights":
        copy = tmp_path / directory.name
        copy.mkdir()
        for path in directory.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        task = dataclasses.replace(task, model=str(copy))
    else:
        task = task_of(directory, **{changed: 3})
    measure_perplexity(task, ["fp32"], file, tell=told.append)
    assert measured == ["fp32", "fp32"]
    (line,) = told
    assert line == f"{file} was measured with other settings or versions: it is written anew"


@pytest.mark.parametrize(
    ("options", "modes", "message"),
    [
        ({}, ["fp32", "w4a16"], "mode must be one of fp32, .*, got 'w4a16'"),
        ({}, ["w8a8-smoothed"], "mode w8a8-smoothed needs a calibration text"),
        ({"window": 1}, ["fp32"], "window must be at least 2, got 1"),
        ({"window": 151}, ["fp32"], "window must be at most the context of 150, got 151"),
        ({"window": 8, "stride": 8}, ["fp32"], "stride must be less than the window of 8, got 8"),
        ({"stride": 0}, ["fp32"], "stride must be at least 1, got 0"),
        ({"outliers": 1.0}, ["fp32"], "outliers must be a factor above 1, got 1.0"),
        ({"outliers": math.nan}, ["fp32"], "outliers must be a factor above 1, got nan"),
        ({"text": pathlib.Path("nowhere.txt")}, ["fp32"], "text nowhere.txt cannot be read"),
        ({"calibration": pathlib.Path("nowhere.txt")}, ["fp32"], "calibration nowhere.txt cannot be read"),
    ],
)
def test_bad_tasks(directory, options, modes, message):
    with pytest.raises(InputError, match=message):
        measure_perplexity(task_of(directory, **options), modes)


def test_a_text_of_one_token(directory, tmp_path):
    (tmp_path / "one.txt").write_text("a", encoding="utf-8")
    with pytest.raises(InputError, match=r"text .*one.txt must have at least 2 tokens in a document"):
        measure_perplexity(task_of(directory, text=tmp_path / "one.txt"), ["fp32"])


def test_a_plot_without_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(InputError, match=r"plot .*a.png needs matplotlib: pip install kogpt-jax\[plot\]"):
        evaluation.check_plot(tmp_path / "a.png")


# -- The committed figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [None, 20])
def test_what_int8_costs_the_demo_model(outliers):
    """`kogpt eval perplexity` on held-out text, with and without added outliers."""
    name = "perplexity_demo.json" if outliers is None else "perplexity_demo_outliers.json"
    result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert result["settings"]["outliers"] == outliers
    assert result["settings"]["text"]["name"] == "reviews.heldout.txt"
    more = {}
    for mode, phase, figures in evaluation.table_rows(result):
        more[mode, phase] = abs(figures["perplexity_percent_more"])
    assert {mode for mode, _ in more} >= {mode for mode, made in MODES.items() if made.kv_dtype is None}
    assert more["w8a16", "prefill"] <= 0.2
    assert more["w8a16", "decode"] <= 0.2
    assert more["w8a8-smoothed", "prefill"] <= 1
    assert more["w8a8-smoothed", "decode"] <= 0.2
    if outliers is not None:
        assert more["w8a8", "prefill"] >= 3


@pytest.mark.parametrize("outliers", [None, 20])
def test_what_an_int8_cache_costs_the_demo_model(outliers):
    """With weights and activations of 16 bits, and beside INT8 ones."""
    name = "perplexity_demo_kv8.json" if outliers is None else "perplexity_demo_outliers_kv8.json"
    result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert result["settings"]["outliers"] == outliers
    more = {row[:2]: abs(row[2]["perplexity_percent_more"]) for row in evaluation.table_rows(result)}
    for phase in evaluation.PHASES:
        assert more["bf16-kv8", phase] <= 0.3
        assert more["w8a16-kv8", phase] <= 0.3
        assert more["w8a8-smoothed-kv8", phase] <= 1


@pytest.mark.parametrize("name", ["folder", "file/result.json"])
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    text = tmp_path / "text.txt"
    text.write_text("정말 재미있는 영화였다\n", encoding="utf-8")
    monkeypatch.setattr(evaluation, "_Source", None)
    with pytest.raises(InputError, match="cannot be written"):
        measure_perplexity(PerplexityTask(model="demo", text=text), ["fp32"], tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "text.txt"]
