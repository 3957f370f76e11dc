"""What benchmarks/bench_vs_transformers_gpu.py makes of its measurements; the measuring itself is for a real device."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def bench(import_benchmark: Callable[[str], Any]) -> Any:
    return import_benchmark("bench_vs_transformers_gpu")


def test_ratios_are_to_the_fastest_way_at_the_same_batch(bench):
    rows = [
        {"system": "kogpt_jax", "batch": 1, "step_ms": 2.0, "call_ms": 300.0},
        {"system": "hf-generate", "batch": 1, "step_ms": 6.0, "call_ms": 600.0},
        {"system": "hf-compiled-loop", "batch": 1, "step_ms": 4.0, "call_ms": 900.0},
        {"system": "kogpt_jax", "batch": 8, "step_ms": 2.0, "call_ms": 300.0},
    ]
    ratios = [(row["step_ratio"], row["call_ratio"]) for row in bench.compare(rows)]
    assert ratios == [(2, 2), (2 / 3, 1), (1, 2 / 3), (None, None)]


def test_a_child_that_fails_or_takes_too_long_says_so(bench):
    task = bench.Task(
        system="kogpt_jax", preset="tiny", layers=0, dtype="fp32", batch=[1], prompt_len=4, new_tokens=16, repeats=1
    )
    failed = bench.run_in_child(task, limit_s=60)
    assert failed["error"] == "InputError: num_layers must be at least 1, got 0"
    assert failed["rows"] == []
    assert bench.run_in_child(task, limit_s=0.01)["error"] == "not finished within 0.01 s"
