"""`all_reduce` and models whose sums it makes, on two GPUs of this machine."""

import dataclasses
import subprocess
import sys
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec as P
from small_model import KERNEL_CONFIG, greedy, prompt
from test_decode_layers import (
    EPSILON,
    KINDS,
    ROUNDED_KINDS,
    assert_same_bits,
    kind_id,
    make_case,
    on_two_shards,
    op_by_op,
)
from test_decode_steps import VOCABS, make_steps, on_shard, step_by_step, with_bias
from test_mesh import replica_problems

from custom_ops import NO_TOKEN, all_reduce, all_reduce_in_order, decode_layers, decode_steps, make_semaphores
from kogpt_jax import KoGPT, SamplingParams, decoding
from kogpt_jax.sharding import cuda_devices, make_mesh

pytestmark = pytest.mark.multigpu

SHAPES = [(1, 4), (3, 20), (1, 4096), (8, 4096), (33, 1540), (64, 4096), (128, 4096)]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 2)


def run_on(mesh, function, x, *more):
    mapped = jax.shard_map(
        lambda x, *more: function(x[0], *more)[None],
        mesh=mesh,
        in_specs=(P("tensor"), *[P()] * len(more)),
        out_specs=P("tensor"),
        check_vma=False,
    )
    return np.asarray(jax.jit(mapped)(x, *more))


@pytest.mark.parametrize("bias_dtype", [jnp.float32, jnp.float16, jnp.bfloat16, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_have_the_bits_of_the_devices_order(mesh, shape, bias_dtype):
    rng = np.random.default_rng(shape)
    x = rng.standard_t(4, (2, *shape)).astype(np.float32)
    terms = {}
    if bias_dtype is not None:
        terms = {
            "bias": jnp.asarray(rng.standard_t(4, shape[1]), bias_dtype),
            "residual": jnp.asarray(rng.standard_t(4, shape), jnp.float32),
        }
    groups = cuda_devices(mesh)[0]
    names, values = tuple(terms), tuple(terms.values())  # arguments: XLA would add up constants first

    def kernel(x, *values):
        terms = dict(zip(names, values, strict=True))
        return all_reduce(x, "tensor", device_groups=groups, implementation="ffi", **terms)

    def in_order(x, *values):
        return all_reduce_in_order(x, "tensor", **dict(zip(names, values, strict=True)))

    expected = run_on(mesh, in_order, x, *values)
    for _ in range(2):
        found = run_on(mesh, kernel, x, *values)
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_array_equal(found, expected)
    exact = x.astype(np.float64).sum(axis=0)
    for value in values:
        exact = exact + np.asarray(value, np.float64)
    np.testing.assert_allclose(found[0], exact, rtol=0, atol=1e-5)
    if shape[0] > 1:  # a row alone
        alone = run_on(mesh, kernel, x[:, 1:2], *(value[1:2] if value.ndim == 2 else value for value in values))
        np.testing.assert_array_equal(alone[0, 0], found[0, 1])


def test_many_calls_of_two_sizes_follow_one_another(mesh):
    groups = cuda_devices(mesh)[0]

    def kernel(x):
        def turn(_, x):
            x = all_reduce(x / 2, "tensor", device_groups=groups, implementation="ffi")
            first = all_reduce(x[:1] / 2, "tensor", device_groups=groups, implementation="ffi")
            return jnp.where(jnp.arange(64)[:, None] == 0, first, x)

        return jax.lax.fori_loop(0, 500, turn, x)

    x = np.random.default_rng(0).normal(size=(2, 64, 4096)).astype(np.float32)
    expected = (x[0] / 2 + x[1] / 2).astype(np.float32)  # of equal parts then, which halving and adding keep
    np.testing.assert_array_equal(run_on(mesh, kernel, x), np.stack([expected, expected]))


@pytest.mark.parametrize("kind", KINDS + ROUNDED_KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_layers_on_two_shards_have_the_bits_of_their_ops(mesh, dtype, kind):
    """Where the sum adds up the product's parts, and makes the next LayerNorm, too."""
    case = make_case(dtype, **kind)
    groups = cuda_devices(mesh)[0]

    def one_call(case):
        options = {"epsilon": EPSILON, "head": case.head, "sum_over": "tensor", "device_groups": groups}
        options["int8_activations"] = case.int8_activations
        return decode_layers(
            *case.arguments(), **options, semaphores=make_semaphores(), prefetch_weights=True, implementation="ffi"
        )[:4]

    expected = on_two_shards(case, lambda case: op_by_op(case, groups))
    for _ in range(2):
        assert_same_bits(on_two_shards(case, one_call), expected)


@pytest.mark.parametrize("kind", KINDS + ROUNDED_KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_steps_on_two_shards_are_those_one_by_one(mesh, vocab, dtype, kind):
    """Tokens, cache and log-probabilities, the same on both devices; an odd vocabulary leaves padding on the second."""
    steps = make_steps(dtype, vocab=vocab, **kind)
    sums: dict[str, Any] = {"sum_over": "tensor", "device_groups": cuda_devices(mesh)[0]}

    def one_by_one(case):
        own = on_shard(steps, case)
        found = step_by_step(dataclasses.replace(steps, case=own.case), **sums)
        return found.new_tokens, found.logprobs, found.k_pages, found.v_pages

    def one_call(case):
        own = on_shard(steps, case)
        options = own.options() | sums | {"num_steps": 4, "head": own.case.head, "semaphores": make_semaphores()}
        found = decode_steps(*own.arguments(), **options, prefetch_weights=True, implementation="ffi")
        return found.new_tokens, found.logprobs, found.k_pages, found.v_pages

    new_tokens, logprobs, *pages = on_two_shards(steps.case, one_by_one)
    for _ in range(2):
        found_tokens, found_logprobs, *found_pages = on_two_shards(steps.case, one_call)
        assert_same_bits((found_tokens, found_pages), (new_tokens, pages))
        np.testing.assert_array_equal(found_logprobs[0], found_logprobs[1])
        tolerances.assert_close(found_logprobs, logprobs, tolerances.LOGPROBS_OF_STEPS)


@pytest.mark.parametrize(
    ("values", "token", "is_number"),  # of 1,301 logits, of which 651 lie on the first shard, those that are not 0
    [
        ({700: 2.0, 30: 2.0}, 30, True),
        ({1300: 2.0, 651: 2.0}, 651, True),
        ({1300: 2.0}, 1300, True),
        ({640: 2.0, 651: 2.0}, 640, True),
        ({7: -0.0}, 0, True),
        ({700: np.nan, 30: np.nan}, 30, False),
        ({1300: np.nan, 651: np.nan}, 651, False),
        ({1300: np.nan, 3: np.inf}, 1300, False),
        ({640: np.inf, 651: np.inf}, 640, False),
        ({1300: np.inf, 651: np.inf}, 651, False),
        ({range(651): -np.inf, 651: -5.0}, 652, True),
        ({range(651, 1301): -np.inf, 0: -5.0}, 1, True),
        ({range(1301): -np.inf}, 0, False),
    ],
    ids=str,
)
def test_of_equal_logits_on_two_shards_the_first_is_taken(mesh, values, token, is_number):
    """And what is no number shows."""
    bias = np.zeros(1301)
    for places, value in values.items():
        bias[places] = value
    steps = with_bias(make_steps("fp16", vocab=1301, num_layers=1), bias)
    sums: dict[str, Any] = {"sum_over": "tensor", "device_groups": cuda_devices(mesh)[0]}

    def one_call(case):
        own = on_shard(steps, case)
        options = own.options() | sums | {"num_steps": 2, "head": own.case.head, "semaphores": make_semaphores()}
        found = decode_steps(*own.arguments(), **options, implementation="ffi")
        return found.new_tokens, found.logprobs, found.k_pages, found.v_pages

    new_tokens, logprobs, *_ = on_two_shards(steps.case, one_call)
    for shard in range(2):
        assert new_tokens[shard].tolist() == [[token] * 2, [token] * 2, [NO_TOKEN] * 2]
        assert np.isnan(logprobs[shard]).tolist() == [[not is_number] * 2, [not is_number] * 2, [False] * 2]
        if is_number:
            exact = bias[token] - np.log(np.exp(bias).sum())
            tolerances.assert_close(logprobs[shard][:2], np.full((2, 2), exact), tolerances.LOGPROBS_OF_STEPS)


def of_rows(steps, rows):
    """These steps for some of their rows."""
    state = {name: getattr(steps, name)[rows] for name in ("tokens", "num_remaining", "ignore_eos")}
    return dataclasses.replace(steps, case=steps.case.of_rows(rows), **state)


def test_calls_of_different_numbers_of_rows_follow_one_another(mesh):
    """Steps of 3, 1 and 3 rows, layers in between, in one program: each call has the results of its own arrays."""
    steps = make_steps("fp16")
    calls = [steps, of_rows(steps, slice(1, 2)), dataclasses.replace(steps, tokens=jnp.roll(steps.tokens, 1))]
    sums: dict[str, Any] = {"sum_over": "tensor", "device_groups": cuda_devices(mesh)[0]}

    def of_calls(case, run_steps, run_layers):
        """What the calls give, one behind the other: tokens, log-probabilities, and the rest in lists."""
        semaphores, found, of_layers = make_semaphores(), [], []
        for each in calls:
            own_case = dataclasses.replace(each.case, layers=case.layers, k_pages=case.k_pages, v_pages=case.v_pages)
            own = on_shard(each, own_case)
            found.append(run_steps(each, own, semaphores))
            *results, semaphores = run_layers(own, found[-1].semaphores)
            of_layers.append(results)
        new_tokens, logprobs = (
            jnp.concatenate([getattr(one, name) for one in found]) for name in ("new_tokens", "logprobs")
        )
        return new_tokens, logprobs, [[one.k_pages, one.v_pages] for one in found], of_layers

    def one_by_one(case):
        return of_calls(
            case,
            lambda each, own, _: step_by_step(dataclasses.replace(each, case=own.case), **sums),
            lambda own, semaphores: (*op_by_op(own.case, sums["device_groups"]), semaphores),
        )

    def one_call_each(case):
        options: dict[str, Any] = sums | {"prefetch_weights": True, "implementation": "ffi"}

        def run_steps(each, own, semaphores):
            own_options = own.options() | options | {"head": own.case.head, "semaphores": semaphores}
            return decode_steps(*own.arguments(), num_steps=4, **own_options)

        def run_layers(own, semaphores):
            own_options = options | {"head": own.case.head, "semaphores": semaphores}
            return decode_layers(*own.case.arguments(), epsilon=EPSILON, **own_options)

        return of_calls(case, run_steps, run_layers)

    new_tokens, logprobs, *rest = on_two_shards(steps.case, one_by_one)
    assert new_tokens.shape == (2, 7, 4)
    for _ in range(2):
        found_tokens, found_logprobs, *found_rest = on_two_shards(steps.case, one_call_each)
        assert_same_bits((found_tokens, found_rest), (new_tokens, rest))
        tolerances.assert_close(found_logprobs, logprobs, tolerances.LOGPROBS_OF_STEPS)


def test_a_device_that_is_named_twice_is_an_error(mesh):
    x = np.ones((2, 1, 4), np.float32)
    with pytest.raises(ValueError, match="a group must have different devices, got 0 twice"):
        run_on(mesh, lambda x: all_reduce(x, "tensor", device_groups=((0, 0),), implementation="ffi"), x)


@pytest.mark.parametrize("quant", ["none", "w8a16"])
@pytest.mark.parametrize("name", ["d1p1t2", "d1p2t1"])
def test_a_mesh_of_two_is_one_device(name, quant):
    """Texts and log-probabilities through all kernels, in fp16; replicas agree; a step communicates by the op alone."""
    # Rows of w_out that are a multiple of 16 on each shard, as INT8 has it.
    config = dataclasses.replace(KERNEL_CONFIG, ffn_dim=224, dtype="fp16", quant=quant, eos_token_ids=())
    one, two = (KoGPT.from_random(config, mesh=mesh, seed=3, implementation="ffi") for mesh in ("d1p1t1", name))
    assert two.ops.all_reduce == "ffi"
    prompts = [prompt(length) for length in (9, 1, 70)]
    for params in (greedy(20), SamplingParams(max_new_tokens=20, temperature=0.8, seed=5, ignore_eos=True)):
        for a, b in zip(one.generate_ids(prompts, params), two.generate_ids(prompts, params), strict=True):
            same = next((i for i in range(20) if a.token_ids[i] != b.token_ids[i]), 20)
            tolerances.assert_close(b.logprobs[:same], a.logprobs[:same], tolerances.LOGPROBS_OF_KERNELS_VS_MESH)
            assert same >= 8, (a.token_ids, b.token_ids)
    state, _ = two._prefill(two._slots(two._requests(prompts, greedy(9))))
    arguments = {"definition": two._definition, "mesh": two.mesh, "num_steps": 8}
    compiled = decoding.decode_loop.lower(two.leaves, state, **arguments).compile()
    module = hlo.Module.parse(compiled.as_text() or "")
    found = [i for i in module.running() if i.opcode.removesuffix("-start") in ("all-reduce", "all-gather")]
    calls = [i for i in module.running() if "kogpt_all_reduce" in i.rest]
    # The embedding, and which token it is; what shards of the layers tell one another is within the steps' one call.
    assert len(calls) == (0 if name == "d1p1t2" else 2)
    if name == "d1p1t2":
        assert [i for i in found if "[" in i.result and hlo.num_elements(i.result) > 1] == []
    assert replica_problems(compiled(two.leaves, state)) == []


@pytest.mark.parametrize("choice", ["auto", "ffi"])
def test_modules_that_are_loaded_lazily_are_told(choice):
    code = f"""
import dataclasses, os
os.environ["CUDA_MODULE_LOADING"] = "LAZY"
from small_model import KERNEL_CONFIG, greedy, prompt
from kogpt_jax import KoGPT
model = KoGPT.from_random(dataclasses.replace(KERNEL_CONFIG, dtype="fp16"), mesh="d1p1t2", implementation={choice!r})
print(model.ops.all_reduce, len(model.generate_ids([prompt(5)], greedy(4))[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd="tests")
    assert "CUDA loads modules lazily: set CUDA_MODULE_LOADING=EAGER before CUDA starts" in done.stderr
    assert done.stdout.split() == (["psum", "4"] if choice == "auto" else [])
