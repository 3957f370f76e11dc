"""`all_reduce` on simulated devices, what the kernel refuses, and which devices add up together."""

import functools
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from custom_ops import LibraryInfo, _library, all_reduce, all_reduce_ffi_problem, all_reduce_in_order
from custom_ops.all_reduce import values_problem
from kogpt_jax import collectives, ops
from kogpt_jax.config import KOGPT_6B, OpsConfig
from kogpt_jax.errors import InputError
from kogpt_jax.ops import resolve_ops
from kogpt_jax.sharding import VOCAB_AXES, cuda_devices, make_mesh
from kogpt_jax.vocabulary import Vocabulary

GRID = (((0, 1), (2, 3)), ((4, 5), (6, 7)))  # [data][pipe][tensor]


def on_mesh(function, *arrays, tensor=4, pipe=1):
    """Rows of the first array are the devices' parts; all others are on every device. What each device gives."""
    specs = (P(("pipe", "tensor")), *[P()] * (len(arrays) - 1))
    mapped = jax.shard_map(
        lambda first, *rest: function(first[0], *rest)[None],
        mesh=make_mesh(1, pipe, tensor),
        in_specs=specs,
        out_specs=P(("pipe", "tensor")),
        check_vma=False,
    )
    return np.asarray(jax.jit(mapped)(*arrays))


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_t(4, (4, 3, 20)).astype(np.float32),
        "bias": rng.standard_t(4, 20).astype(jnp.bfloat16),
        "residual": rng.standard_t(4, (3, 20)).astype(np.float32),
    }


@pytest.mark.parametrize("has_terms", [True, False])
def test_the_reference_adds_up_what_all_devices_have(parts, has_terms):
    terms = {"bias": parts["bias"], "residual": parts["residual"]} if has_terms else {}

    def run(x):
        return all_reduce(x, "tensor", implementation="reference", **terms)

    expected = parts["x"].astype(np.float64).sum(axis=0)
    if has_terms:
        expected = expected + parts["residual"] + parts["bias"].astype(np.float64)
    found = on_mesh(run, parts["x"])
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=0, atol=1e-5)


def test_in_order_means_the_order_of_the_devices(parts):
    def run(x):
        return all_reduce_in_order(x, "tensor", bias=parts["bias"], residual=parts["residual"])

    total = functools.reduce(np.add, parts["x"])  # in f32, one after another
    expected = (parts["residual"] + total) + parts["bias"].astype(np.float32)
    np.testing.assert_array_equal(on_mesh(run, parts["x"]), np.broadcast_to(expected, parts["x"].shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "auto"}, "implementation must be 'reference' or 'ffi', got 'auto'"),
        ({"x": np.zeros((2, 3, 4), np.float32)}, "x must have 2 axes"),
        ({"x": np.zeros((3, 20), np.float16)}, "x must be float32, got float16"),
        ({"bias": np.zeros(20, np.int32)}, "bias must be float32 or float16 or bfloat16, got int32"),
        ({"bias": np.zeros(19, np.float32)}, r"bias must have shape \(20,\), got \(19,\)"),
        ({"residual": np.zeros((3, 20), np.float16)}, "residual must be float32, got float16"),
        ({"residual": np.zeros((2, 20), np.float32)}, r"residual must have shape \(3, 20\), got \(2, 20\)"),
        ({"timeout_s": 0.0}, "timeout_s must be 0.001 to 1e6 seconds, got 0.0"),
        ({"timeout_s": float("nan")}, "timeout_s must be 0.001 to 1e6 seconds, got nan"),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_wrong_arguments_are_named(parts, change, message, implementation):
    arguments = {"implementation": implementation, "bias": None, "residual": None} | change
    x = jnp.asarray(arguments.pop("x", parts["x"][0]))
    arguments = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        all_reduce(x, "tensor", **arguments)


@pytest.mark.parametrize(
    ("x", "groups", "message"),
    [
        (np.zeros((3, 20), np.float32), (), "device_groups must be groups of 4 devices"),
        (np.zeros((3, 20), np.float32), ((0, 1), (2, 3)), "device_groups must be groups of 4 devices"),
        (np.zeros((3, 18), np.float32), ((0, 1, 2, 3),), r"rows of a multiple of 4, got shape \(3, 18\)"),
        (np.zeros((129, 4096), np.float32), ((0, 1, 2, 3),), r"4 to 524288 values .* got shape \(129, 4096\)"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(x, groups, message):
    def run(x):
        return all_reduce(x, "tensor", device_groups=groups, implementation="ffi")

    with pytest.raises(ValueError, match=message):
        on_mesh(run, np.stack([x] * 4))


def test_problems_are_told_before_a_call(monkeypatch):
    monkeypatch.setattr(_library, "load", lambda _: LibraryInfo("cuda", problem="it was not built"))
    assert all_reduce_ffi_problem(platform="cpu", device_groups=((0, 1),)) == "it has no kernel for cpu"
    assert all_reduce_ffi_problem(platform="gpu", device_groups=((0, 1),)) == "it was not built"
    monkeypatch.setattr(_library, "load", lambda _: LibraryInfo("cuda", problem=None))
    for groups in ((), ((0,),), ((0, 1), (2,)), (tuple(range(9)),)):
        problem = all_reduce_ffi_problem(platform="gpu", device_groups=groups)
        assert problem == f"groups must have 2 to 8 devices, all as many, got {groups}"


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        (("tensor",), ((0, 1), (2, 3), (4, 5), (6, 7))),
        (VOCAB_AXES, ((0, 1, 2, 3), (4, 5, 6, 7))),
        (("pipe",), ((0, 2), (1, 3), (4, 6), (5, 7))),
        (("data", "pipe", "tensor"), ((0, 1, 2, 3, 4, 5, 6, 7),)),
    ],
)
def test_devices_add_up_along_axes_of_the_mesh(axes, groups):
    assert collectives.device_groups(GRID, axes) == groups
    assert collectives.num_along(GRID, axes) == len(groups[0])
    # The places along the axes are JAX's own.
    mesh = make_mesh(2, 2, 2)

    def own(device):
        return jax.lax.all_gather(device.reshape(()), axes)[None]

    numbers = np.arange(8, dtype=np.int32)
    mapped = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=P(("data", "pipe", "tensor")),
        out_specs=P(("data", "pipe", "tensor")),
        check_vma=False,
    )
    assert {tuple(row) for row in np.asarray(mapped(numbers)).tolist()} == set(groups)


def test_simulated_devices_have_no_cuda_numbers():
    assert cuda_devices(make_mesh(1, 1, 2)) == ()


@pytest.mark.parametrize("shape", [(3, 5), (3, 4), (1,)])
@pytest.mark.parametrize("kind", ["psum", "in_order", "ffi"])
def test_few_values_are_gathered_by_a_sum(monkeypatch, shape, kind):
    """With "ffi" by a sum with zeros in place of the other devices' values, here the reference's."""

    def instead(x, axes, *, device_groups, bias, residual, prefetch_bias, implementation):
        assert (implementation, prefetch_bias, bias, residual) == ("ffi", True, None, None)
        assert device_groups == ((0, 1, 2, 3),)
        assert values_problem(x.shape) is None
        return all_reduce(x, axes, implementation="reference")

    monkeypatch.setattr(collectives, "all_reduce", instead)
    config = OpsConfig(all_reduce=kind, devices=(((0, 1), (2, 3)),) if kind == "ffi" else ())
    values = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    values[2].flat[0] = -np.inf

    def run(x):
        return collectives.gather(x, VOCAB_AXES, config)

    found = on_mesh(run, values, tensor=2, pipe=2)
    for each in found:
        np.testing.assert_array_equal(each, values)


@pytest.mark.parametrize(("tokens", "is_kernel"), [(5, True), (140, False)])
def test_few_tokens_are_looked_up_by_the_kernel_and_prompts_by_the_library(monkeypatch, tokens, is_kernel):
    """Bit for bit what one device holds, in the table's dtype."""
    calls = []

    def instead(x, axes, **_):
        calls.append(x.shape)
        return all_reduce(x, axes, implementation="reference")

    monkeypatch.setattr(collectives, "all_reduce", instead)
    monkeypatch.setattr(collectives, "all_reduce_reference", None)
    monkeypatch.setattr(collectives, "all_reduce_in_order", None)
    config = OpsConfig(all_reduce="ffi", all_reduce_many_values="in_order", devices=(((0, 1), (2, 3)),))
    vocabulary = Vocabulary(11, 4, config)
    rng = np.random.default_rng(3)
    table = rng.normal(size=(12, 4096)).astype(jnp.bfloat16)
    ids = rng.integers(0, 11, tokens).astype(np.int32)
    found = on_mesh(lambda part, ids: vocabulary.lookup(part, ids), table.reshape(4, 3, 4096), ids, tensor=2, pipe=2)
    np.testing.assert_array_equal(found.astype(np.float32), np.stack([table[ids].astype(np.float32)] * 4))
    assert calls == [(tokens, 4096)] * is_kernel


def test_more_values_than_the_kernel_takes_go_another_way(monkeypatch):
    monkeypatch.setattr(collectives, "all_reduce", None)
    x = np.random.default_rng(2).normal(size=(4, 130, 4096)).astype(np.float32)
    for many in ("psum", "in_order"):
        config = OpsConfig(all_reduce="ffi", all_reduce_many_values=many, devices=(((0, 1, 2, 3),),))
        found = on_mesh(lambda x, config=config: collectives.sum_over(x, ("tensor",), config), x)
        np.testing.assert_allclose(found[0], x.sum(axis=0), atol=1e-5)


def test_sums_over_shards_are_settled_once(monkeypatch, caplog):
    """By the kernel where it can serve; where it cannot "auto" says why and takes the library's, "ffi" is an error."""
    for op in ("decode_attention", "linear", "prefill_attention"):
        monkeypatch.setattr(ops, f"{op}_ffi_problem", lambda **_: None)
    asked = []

    def problem(*, platform, device_groups):
        asked.append(device_groups)
        return reason

    monkeypatch.setattr(ops, "all_reduce_ffi_problem", problem)
    reason = None
    for choice in ("auto", "ffi"):
        found = resolve_ops(KOGPT_6B, choice, platform="gpu", num_shards=2, devices=GRID)
        assert (found.all_reduce, found.all_reduce_many_values, found.devices) == ("ffi", "psum", GRID)
        assert "sums over shards ffi" in ops.describe(found)
    assert set(asked) == {collectives.device_groups(GRID, axes) for axes in (("tensor",), VOCAB_AXES)}
    found = resolve_ops(KOGPT_6B, "auto", platform="gpu", num_shards=2, devices=GRID, deterministic=True)
    assert (found.all_reduce, found.all_reduce_many_values) == ("ffi", "in_order")

    reason = "the wires are cut"
    with caplog.at_level(logging.WARNING, "kogpt_jax"):
        found = resolve_ops(KOGPT_6B, "auto", platform="gpu", num_shards=2, devices=GRID)
    assert (found.all_reduce, found.devices) == ("psum", ())
    assert [record.getMessage() for record in caplog.records] == [
        f"sums over shards are the collective library's: {reason}"
    ]
    with pytest.raises(InputError, match=f"'ffi' cannot be used for all_reduce: {reason}"):
        resolve_ops(KOGPT_6B, "ffi", platform="gpu", num_shards=2, devices=GRID)

    asked.clear()  # nothing to add up, or over processes
    for devices in ((((0,),),), (((0,),), ((1,),)), ()):
        assert resolve_ops(KOGPT_6B, "ffi", platform="gpu", devices=devices).all_reduce == "psum"
    assert asked == []


@pytest.mark.parametrize(("set_to", "origin"), [(None, "kogpt_jax"), ("LAZY", "user")])
def test_cuda_loads_eagerly_for_several_devices(set_to, origin):
    code = f"""
import os
os.environ.pop("CUDA_MODULE_LOADING", None)
if {set_to!r}: os.environ["CUDA_MODULE_LOADING"] = {set_to!r}
from kogpt_jax import runtime
runtime.configure()
assert not any(setting.name == "CUDA_MODULE_LOADING" for setting in runtime.settings())
runtime.configure(num_shards=2)
runtime.configure(num_shards=2)
print(*[setting for setting in runtime.settings() if setting.name == "CUDA_MODULE_LOADING"][0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["CUDA_MODULE_LOADING", set_to or "EAGER", origin]
