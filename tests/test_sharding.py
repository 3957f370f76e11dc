"""Mesh names, meshes, and logical axes on them."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec
from small_model import CONFIG

from kogpt_jax.errors import InputError
from kogpt_jax.model import model_def
from kogpt_jax.sharding import MESH_AXES, make_mesh, named_sharding, parse_mesh, partition_spec


def test_the_one_supported_mesh():
    assert parse_mesh("d1p1t1") == (1, 1, 1)
    mesh = make_mesh(*parse_mesh("d1p1t1"))
    assert mesh.axis_names == MESH_AXES == ("data", "pipe", "tensor")
    assert mesh.shape == {"data": 1, "pipe": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3


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


@pytest.mark.parametrize("name", ["d2p1t1", "d1p2t1", "d1p1t2", "d8p4t8"])
def test_several_devices_are_refused_by_name(name):
    with pytest.raises(InputError, match=f"mesh '{name}' is not supported yet"):
        parse_mesh(name)


def test_a_mesh_needs_its_devices():
    found = len(jax.devices())
    with pytest.raises(InputError, match=rf"d1p1t{found + 1} needs {found + 1} devices, found {found}"):
        make_mesh(tensor=found + 1)
    with pytest.raises(InputError, match="d1p1t1 needs 1 devices, found 0"):
        make_mesh(devices=[])


def test_partition_spec_maps_logical_axes():
    assert partition_spec(("batch", "q_len")) == PartitionSpec("data", None)
    assert partition_spec(("tensor_shard", "fused", "embed")) == PartitionSpec("tensor", None, None)
    assert partition_spec(("pages", "heads", "kv_len", "head_dim")) == PartitionSpec("data", "tensor", None, None)
    assert partition_spec((None, "heads")) == PartitionSpec(None, "tensor")
    assert partition_spec(()) == PartitionSpec()


@pytest.mark.parametrize("axes", [("batch", "pages"), ("heads", "embed", "tensor_shard"), ("heads", "heads")])
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


def test_a_fused_weight_is_split_by_its_shard_axis_alone():
    """Shards of ``w_in`` and ``w_out`` are stacked: slicing the fused axis would give a device other heads' rows."""
    for num_shards in (1, 3):
        definition = model_def(CONFIG, num_shards)
        for param, spec in zip(definition.params, definition.leaf_specs(), strict=True):
            if param.path.endswith((".w_in", ".w_out", ".b_ffn_in")):
                assert param.shape[0] == num_shards
                assert spec == PartitionSpec("tensor", *[None] * (len(param.shape) - 1))
            else:
                assert set(spec) == {None}, f"{param.path} is {spec}"
