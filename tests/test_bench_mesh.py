"""What benchmarks/bench_mesh.py derives from its measurements; the measuring itself is for real devices."""

from collections.abc import Callable
from typing import Any

import pytest

from kogpt_jax.config import KOGPT_6B


@pytest.fixture
def bench(import_benchmark: Callable[[str], Any]) -> Any:
    return import_benchmark("bench_mesh")


def test_every_mesh_of_so_many_devices_is_named_once(bench):
    assert bench.all_meshes(1) == ["d1p1t1"]
    assert bench.all_meshes(3) == ["d1p1t1", "d1p1t2", "d1p2t1", "d2p1t1"]
    assert len(set(bench.all_meshes(8))) == len(bench.all_meshes(8)) == 1 + 3 + 6 + 10


def test_bytes_that_bound_a_step(bench, import_benchmark):
    """Tensor shards share weights, a pipeline's stages read theirs one after another, and all share the cache."""
    step_bytes = import_benchmark("bench_generate").step_bytes
    weights = step_bytes(KOGPT_6B, 0, 0)
    cache = step_bytes(KOGPT_6B, 8, 1000) - weights
    expected = {
        (1, 1, 1): weights + cache,
        (1, 1, 4): (weights + cache) / 4,
        (4, 1, 1): weights + cache / 4,
        (1, 4, 1): weights + cache / 4,
        (2, 2, 2): weights / 2 + cache / 8,
    }
    for extents, num_bytes in expected.items():
        assert bench.device_step_bytes(KOGPT_6B, extents, 8, 1000) == pytest.approx(num_bytes)


def test_speed_ups_are_over_one_device_and_never_of_simulated_ones(bench):
    def row(mesh: str, num_devices: int, batch: int, step_ms: float) -> dict[str, Any]:
        key = {"mesh": mesh, "num_devices": num_devices, "dtype": "bf16", "quant": "none", "batch": batch}
        return key | {"step_ms": step_ms, "prefill_ms": 2 * step_ms, "tokens_per_s": 1e3 * batch / step_ms}

    rows = [row("d1p1t1", 1, 4, 5.0), row("d1p1t1", 1, 8, 6.0), row("d1p2t1", 2, 8, 5.5), row("d2p1t1", 2, 6, 5.0)]
    one, _, pipeline, other = bench.with_speed_ups(rows, are_simulated=False)
    assert one["speed_up"] == one["scaled_speed_up"] == one["efficiency_percent"] / 100 == 1
    assert pipeline["speed_up"] == pipeline["prefill_speed_up"] == pytest.approx(6 / 5.5)
    assert pipeline["efficiency_percent"] == pytest.approx(100 * 3 / 5.5)
    assert pipeline["scaled_speed_up"] == pytest.approx(2 * 5 / 5.5)
    assert other["speed_up"] is other["scaled_speed_up"] is None
    for simulated in bench.with_speed_ups(rows, are_simulated=True):
        assert simulated["speed_up"] is simulated["efficiency_percent"] is simulated["scaled_speed_up"] is None
