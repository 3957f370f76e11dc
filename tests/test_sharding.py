"""Mesh names, meshes, and logical axes on them."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec
from small_model import CONFIG

from kogpt_jax.errors import InputError
from kogpt_jax.model import model_def
from kogpt_jax.sharding import (
    MESH_AXES,
    Split,
    make_mesh,
    mesh_name,
    named_sharding,
    parse_mesh,
    partition_spec,
)


@pytest.mark.parametrize("name", ["d1p1t1", "d2p1t4", "d1p2t2", "d1p8t1"])
def test_a_mesh_has_the_extents_of_its_name(name):
    extents = parse_mesh(name)
    assert extents == (int(name[1]), int(name[3]), int(name[5]))
    mesh = make_mesh(*extents)
    assert mesh.axis_names == MESH_AXES == ("data", "pipe", "tensor")
    assert mesh.devices.shape == extents
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh_name(mesh) == name
    assert Split.of(mesh) == extents[1:]


def test_extents_may_have_several_digits():
    assert parse_mesh("d16p1t12") == (16, 1, 12)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [
        (4, 1, [[0], [1], [2], [3]]),
        (4, 2, [[0, 2], [1, 3]]),
        (7, 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (5, 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (3, 4, [[0, 1, 2, 3]]),
    ],
)
def test_layers_lie_in_a_row_over_the_stages(num_layers, num_stages, expected):
    split = Split(num_stages)
    assert split.layers_per_stage(num_layers) == len(expected)
    assert [list(split.layers_of_block(block, num_layers)) for block in range(len(expected))] == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1",
        "d1",
        "d1p1",
        "p1d1t1",
        "d1p1t1 ",
        " d1p1t1",
        "d1p1t1\n",
        "D1P1T1",
        "d1p1t0",
        "d01p1t1",
        "d0p1t1",
        "d-1p1t1",
    ],
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(InputError, match="mesh must look like 'd1p1t1'") as caught:
        parse_mesh(name)
    assert repr(name) in str(caught.value)


def test_a_mesh_needs_its_devices():
    found = len(jax.devices())
    with pytest.raises(InputError, match=rf"d1p1t{found + 1} needs {found + 1} devices, found {found}"):
        make_mesh(tensor=found + 1)
    with pytest.raises(InputError, match="d1p1t1 needs 1 devices, found 0"):
        make_mesh(devices=[])


def test_partition_spec_maps_logical_axes():
    assert partition_spec(("batch", "q_len")) == PartitionSpec("data", None)
    assert partition_spec(("tensor_shard", "fused", "embed")) == PartitionSpec("tensor", None, None)
    assert partition_spec(("pages", "heads", "kv_len", "head_dim")) == PartitionSpec(
        ("data", "pipe"), "tensor", None, None
    )
    assert partition_spec(("vocab", "embed")) == PartitionSpec(("pipe", "tensor"), None)
    assert partition_spec((None, "heads")) == PartitionSpec(None, "tensor")
    assert partition_spec(()) == PartitionSpec()


@pytest.mark.parametrize(
    "axes", [("batch", "pages"), ("heads", "embed", "tensor_shard"), ("heads", "heads"), ("stage", "vocab")]
)
def test_two_axes_on_one_mesh_axis_are_refused(axes):
    with pytest.raises(ValueError, match="twice on one mesh axis") as caught:
        partition_spec(axes)
    assert str(axes) in str(caught.value)


def test_an_unknown_logical_axis_is_refused():
    with pytest.raises(KeyError, match="head"):
        partition_spec(("batch", "head"))


def test_named_sharding_is_the_partition_on_the_mesh():
    mesh = make_mesh()
    sharding = named_sharding(mesh, ("batch", None))
    assert sharding.mesh == mesh
    assert sharding.spec == PartitionSpec("data", None)


@pytest.mark.parametrize("split", [Split(1, 1), Split(1, 3), Split(2, 3), Split(4, 1)], ids=str)
def test_a_fused_weight_is_split_by_its_stages_and_shards_alone(split):
    """Shards of ``w_in`` and ``w_out`` are stacked: slicing the fused axis would give a device other heads' rows."""
    config = dataclasses.replace(CONFIG, ffn_dim=81)
    definition = model_def(config, split)
    for param, spec in zip(definition.params, definition.leaf_specs(), strict=True):
        name = param.path.rpartition(".")[2]
        if name in ("w_in", "w_out", "b_ffn_in"):
            assert param.shape[:2] == split
            assert spec == PartitionSpec("pipe", "tensor", *[None] * (len(param.shape) - 2))
        elif param.path.startswith("blocks"):
            assert param.shape == (split.num_stages, config.model_dim)
            assert spec == PartitionSpec("pipe", None)
        elif name in ("embedding", "lm_head", "lm_head_bias"):
            assert 0 <= param.shape[0] - config.vocab_size < math.prod(split)
            assert spec[0] == ("pipe", "tensor")
        else:
            assert set(spec) == {None}, f"{param.path} is {spec}"


@pytest.mark.parametrize(
    ("num_shards", "message"),
    [
        (2, "num_heads 3 is not a multiple of the 2 tensor shards"),
        (3, "ffn_dim 80 is not a multiple of the 3 tensor shards"),
    ],
)
def test_shards_that_do_not_divide_the_model_are_refused(num_shards, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        model_def(CONFIG, Split(num_shards=num_shards))
