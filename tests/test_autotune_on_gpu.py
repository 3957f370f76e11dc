"""What `kogpt autotune` does on a GPU: every tile is timed, none is wrong, and the next call takes the fastest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import custom_ops
from custom_ops import autotune
from custom_ops.autotune import Choice
from kogpt_jax import tuning
from kogpt_jax.config import ModelConfig
from kogpt_jax.ops import resolve_ops

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    vocab_size=512, max_len=512, model_dim=512, num_layers=2, num_heads=4, rotary_dim=64, ffn_dim=2048, dtype="bf16"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "_user_folder", tmp_path)
    yield tmp_path
    autotune._load_table.cache_clear()


@pytest.mark.parametrize("quant", ["w8a16", "w8a8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_tile_is_timed_and_right(quant, dtype):
    config = dataclasses.replace(CONFIG, quant=quant, dtype=dtype)
    problems = tuning.make_problems([config], [100, 1000], platform="gpu")
    assert len(problems) == 4
    results, path = tuning.tune_products(problems, platform="gpu")
    assert [result.rejected for result in results] == [()] * 4
    device = autotune.find_device("gpu")
    assert device is not None
    assert device.name == jax.devices("gpu")[0].device_kind
    table = autotune.read_table(path, device)
    op = results[0].key.op
    tiles = custom_ops.library_info()[1].tiles[op]
    others = {Choice("reference"), Choice("linear")} if quant == "w8a16" else {Choice("reference")}
    for result in results:
        assert result.before_us is not None
        entry = table[result.key]
        assert {timed.choice for timed in entry} == {Choice("ffi", tile) for tile in tiles} | others
        fastest = next(timed.choice.tile for timed in entry if timed.choice.implementation == "ffi")
        key = result.key
        found = autotune.tile_index(op, config.jax_dtype, key.num_outputs, key.k_dim, key.rows - 1)
        assert found == (tiles.index(fastest) if len(tiles) > 1 else autotune.TILE_BY_SHAPE)
    assert resolve_ops(config, "auto", platform="gpu").gemm in ("reference", "ffi", "linear")


def test_a_tuned_call_gives_the_same_bits():
    config = dataclasses.replace(CONFIG, quant="w8a16")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(100, 512)), jnp.bfloat16)
    weight = custom_ops.quantize_weight(jnp.asarray(rng.normal(size=(3 * 512 + 2048, 512)) / 20, jnp.float32))

    def run(tile):
        call = jax.jit(lambda x, weight: custom_ops.mixed_gemm(x, weight, tile=tile, implementation="ffi")[0])
        return call(x, weight)

    expected = run(autotune.TILE_BY_SHAPE)
    tuning.tune_products(tuning.make_problems([config], [100], platform="gpu"), platform="gpu")
    np.testing.assert_array_equal(run(None), expected)
