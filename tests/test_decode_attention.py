"""`custom_ops.decode_attention`: the reference against sums in f64, the kernels against the reference's own error, and
what must not depend on anything. test_gpu.py runs the same functions on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
import tolerances
from hlo import Module, num_elements
from jax.sharding import PartitionSpec
from op_cases import DecodeAttentionCase, case_id, decode_attention_arguments, decode_attention_oracle

import custom_ops
from custom_ops import make_semaphores
from custom_ops.decode_attention import _attend_all_pages, _attend_page_after_page

CASES = [case for case in op_cases.read_cases("decode_attention") if case.dtype != "fp32"]
FP32_CASES = [case for case in op_cases.read_cases("decode_attention") if case.dtype == "fp32"]
ALIASED = ("act", "k_pages", "v_pages")

with_library = pytest.mark.host


def run(arguments, implementation: str = "ffi"):
    """(act, k_pages, v_pages, semaphores), floats in f32, which is exact; what is aliased is given away."""
    arguments = dict(arguments)
    donated = {name: jnp.copy(arguments.pop(name)) for name in ALIASED}
    results = _call(donated, make_semaphores(), arguments, implementation=implementation)
    return (*map(in_f32, results[:3]), np.asarray(results[3]))


def in_f32(array) -> np.ndarray:
    """NaNs of numpy's 16-bit types are not equal to themselves in its comparisons."""
    return np.asarray(array).astype(np.float32)


def _decode_attention(donated, semaphores, others, *, implementation):
    return custom_ops.decode_attention(**donated, **others, semaphores=semaphores, implementation=implementation)


_call = jax.jit(_decode_attention, static_argnames="implementation", donate_argnums=(0, 1))


def is_appended(case: DecodeAttentionCase, arguments) -> np.ndarray:
    """Where new tokens go in the pool of pages: [pages, page_len]."""
    where = np.zeros((arguments["k_pages"].shape[0], case.page_len), bool)
    for row, length in enumerate(case.lengths):
        if case.num_new[row]:
            page = arguments["page_table"][row, length // case.page_len]
            where[page, length % case.page_len] = True
    return where


def check_result(case: DecodeAttentionCase, arguments, results, errors, what: str) -> None:
    """The output within its tolerance, and beside it and the new tokens not a bit changed."""
    act, k_pages, v_pages, semaphores = results
    width = case.heads * case.head_dim
    oracle = decode_attention_oracle(case, arguments)
    tolerances.assert_close(act[:, :width], oracle[0], errors["out"], what)
    np.testing.assert_array_equal(act[:, width:], in_f32(arguments["act"])[:, width:])
    assert not np.any(semaphores)
    where = is_appended(case, arguments)[:-1]  # the last page is scratch
    for name, pages, expected in (("k", k_pages, oracle[1]), ("v", v_pages, oracle[2])):
        before = in_f32(arguments[f"{name}_pages"])
        untouched = np.broadcast_to(~where[:, None, :, None], before[:-1].shape)
        np.testing.assert_array_equal(pages[:-1][untouched], before[:-1][untouched])
        if where.any():
            new = np.moveaxis(pages[:-1], 1, 2)[where]
            tolerances.assert_close(
                new, np.moveaxis(expected[:-1], 1, 2)[where], errors["k"], f"{what}: appended {name}"
            )


def check_errors(case: DecodeAttentionCase) -> None:
    arguments = decode_attention_arguments(case)
    oracle = decode_attention_oracle(case, arguments)
    act = run(arguments, "reference")[0]
    error = tolerances.relative_error(act[:, : oracle[0].shape[1]], oracle[0])
    errors = {
        "out": tolerances.twice_the_references_error(error, case.dtype),
        "k": tolerances.twice_the_references_error(0.0, case.dtype),  # rounded once
    }
    for name in op_cases.instruction_sets():
        op_cases.limit_instruction_set(name)
        results = run(arguments)
        check_result(case, arguments, results, errors, f"on {name}")
        again = run(arguments)
        jax.tree.map(np.testing.assert_array_equal, results, again)


@pytest.mark.parametrize("case", CASES + FP32_CASES, ids=case_id)
def test_reference_against_f64(case):
    arguments = decode_attention_arguments(case)
    module = tolerances.MODULE[case.dtype]
    check_result(case, arguments, run(arguments, "reference"), {"out": module, "k": module}, "reference")


@with_library
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_at_most_twice_the_references(case):
    check_errors(case)


@with_library
@pytest.mark.parametrize("case", FP32_CASES, ids=case_id)
def test_error_in_f32_is_at_most_twice_the_references(case):
    check_errors(case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("attend", [_attend_all_pages, _attend_page_after_page], ids=lambda f: f.__name__)
def test_both_ways_of_the_reference(attend, dtype):
    """Each platform runs one of the two; both give softmax(q k / sqrt(H)) v over the valid keys and nothing else."""
    lengths = (0, 62, 63, 64, 191)
    case = DecodeAttentionCase(
        batch=5, heads=3, head_dim=24, page_len=64, max_pages=3, lengths=lengths, num_new=(1,) * 5, dtype=dtype
    )
    arguments = decode_attention_arguments(case)
    oracle, k_pages, v_pages = decode_attention_oracle(case, arguments)
    jax_dtype = op_cases.DTYPES[dtype]
    q = arguments["qkv"].reshape(5, 3, 3, 24)[:, 0]
    pages = (jnp.asarray(k_pages, jax_dtype), jnp.asarray(v_pages, jax_dtype))
    out = jax.jit(attend)(q, *pages, arguments["page_table"], arguments["lengths"] + 1)
    assert out.dtype == jax_dtype
    for row, length in enumerate(lengths):
        tolerances.assert_close(
            np.asarray(out)[row].reshape(-1), oracle[row], tolerances.MODULE[dtype], f"{length + 1} keys"
        )


def test_a_row_of_the_reference_is_the_same_bits_beside_a_longer_one():
    """Pages that only the neighbour needs leave a row's sums as they are."""
    rng = np.random.default_rng(1)
    k_pages, v_pages = (jnp.asarray(rng.normal(size=(7, 3, 64, 24)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(2, 3, 24)), jnp.float32)
    page_table = jnp.arange(6).reshape(2, 3)
    attend = jax.jit(_attend_page_after_page)
    beside_short, beside_long = (attend(q, k_pages, v_pages, page_table, jnp.asarray([70, n])) for n in (1, 190))
    np.testing.assert_array_equal(beside_short[0], beside_long[0])


def rows_of(arguments, rows):
    """The same call for some of the rows; the pool of pages stays whole."""
    by_row = {name: arguments[name][rows] for name in ("qkv", "page_table", "lengths", "num_new", "act")}
    return arguments | by_row | {"rotary": tuple(table[rows] for table in arguments["rotary"])}


@with_library
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_row_is_the_same_bits_in_every_batch(head_dim):
    """Each row alone and in two batches with other neighbours, and in a table with room for more pages."""
    rng = np.random.default_rng(2)
    lengths = tuple(int(length) for length in rng.integers(0, 320, 64))
    case = DecodeAttentionCase(
        batch=64,
        heads=1,
        head_dim=head_dim,
        page_len=64,
        max_pages=5,
        rotary_dim=32,
        lengths=lengths,
        num_new=(1,) * 64,
    )
    arguments = decode_attention_arguments(case)
    for name in op_cases.instruction_sets():
        op_cases.limit_instruction_set(name)
        expected = run(arguments)[0]
        assert np.all(np.isfinite(expected))
        for row in range(64):
            alone = run(rows_of(arguments, np.asarray([row])))[0]
            np.testing.assert_array_equal(alone[0], expected[row])
        for batch in (2, 7, 33):
            chosen = rng.permutation(64)[:batch]
            np.testing.assert_array_equal(run(rows_of(arguments, chosen))[0], expected[chosen])
    wider = jnp.pad(arguments["page_table"], ((0, 0), (0, 3)), constant_values=arguments["k_pages"].shape[0] - 1)
    np.testing.assert_array_equal(run(arguments | {"page_table": wider})[0], expected)


@with_library
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_prefetched_cache_gives_the_same_bits(is_int8):
    """Behind a product that is still running when attention starts, and with lengths that are only just there."""
    case = DecodeAttentionCase(
        batch=3,
        heads=4,
        head_dim=64,
        page_len=64,
        max_pages=9,
        rotary_dim=64,
        lengths=(500, 65, 300),
        num_new=(1, 1, 0),
        act_dim=300,
    )
    arguments = decode_attention_arguments(case)
    if is_int8:
        arguments |= {name: custom_ops.quantize_weight(arguments[name]) for name in ALIASED[1:]}
    k_dim = 2048
    x = jax.random.normal(jax.random.key(0), (case.batch, k_dim)).astype(arguments["qkv"].dtype)
    weight = jax.random.normal(jax.random.key(1), (arguments["qkv"].shape[1], k_dim)).astype(x.dtype)

    @functools.partial(jax.jit, static_argnames="prefetch_cache")
    def layers(arguments, x, weight, *, prefetch_cache):
        arguments, semaphores = dict(arguments), make_semaphores()
        lengths, results = arguments.pop("lengths"), []
        for _ in range(3):
            qkv, semaphores = custom_ops.linear(
                x, weight, semaphores=semaphores, prefetch_weight=True, implementation="ffi"
            )
            *result, semaphores = custom_ops.decode_attention(
                **arguments | {"qkv": qkv},
                lengths=lengths,
                semaphores=semaphores,
                prefetch_cache=prefetch_cache,
                implementation="ffi",
            )
            results.append(result)  # of other copies of the cache: none is written by the op before
            lengths = jnp.maximum(lengths - 1, 0)
        return results, semaphores

    plain = layers(arguments, x, weight, prefetch_cache=False)
    prefetched = layers(arguments, x, weight, prefetch_cache=True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(in_f32(a), in_f32(b)), plain, prefetched)


@with_library
@pytest.mark.parametrize("is_int8", [False, True])
def test_cache_and_result_are_updated_in_place(is_int8):
    """In a loop, too: no array of the size of the cache is made in its body."""
    case = DecodeAttentionCase(
        batch=2, heads=2, head_dim=64, page_len=64, max_pages=9, lengths=(100, 0), num_new=(1, 1), act_dim=777
    )
    arguments = decode_attention_arguments(case)
    if is_int8:
        arguments |= {name: custom_ops.quantize_weight(arguments[name]) for name in ALIASED[1:]}
    donated = {name: arguments.pop(name) for name in ALIASED}

    def steps(donated, semaphores, others):
        def step(_, carry):
            donated, lengths, semaphores = carry
            *results, semaphores = custom_ops.decode_attention(
                **donated, **(others | {"lengths": lengths}), semaphores=semaphores, implementation="ffi"
            )
            return dict(zip(ALIASED, results, strict=True)), lengths + 1, semaphores

        return jax.lax.fori_loop(0, 5, step, (donated, others["lengths"], semaphores))

    lowered = jax.jit(steps, donate_argnums=(0, 1)).lower(donated, make_semaphores(), arguments)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert text is not None
    call = next(line for line in text.splitlines() if 'custom_call_target="kogpt_decode_attention"' in line)
    for result, argument in [(0, 10), (1, 3), (3, 5), (6, 11)] + [(2, 4), (4, 6)] * is_int8:
        assert f"{{{result}}}: ({argument}, {{}})" in call
    module = Module.parse(text)
    pages = jax.tree.leaves([donated[name] for name in ALIASED[1:]])
    sizes = {array.size for array in pages}
    aliased = [parameter for parameter in module.aliased_parameters() if num_elements(parameter.result) in sizes]
    assert len(aliased) == len(pages)
    copied = [num_elements(i.result) for i in module.running() if i.opcode.startswith("copy")]
    assert not [size for size in copied if size in sizes or size > max(sizes)]
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in jax.tree.leaves(donated))


@with_library
def test_inside_shard_map_nothing_is_gathered():
    """One device on a GPU machine of one; test_ops_on_cpu.py has two."""
    check_shard_map(jax.devices()[:1])


def check_shard_map(devices):
    """Heads are sharded: each device has its own of q, k, v and of the cache."""
    num_devices = len(devices)
    mesh = jax.make_mesh((num_devices,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    case = DecodeAttentionCase(
        batch=2, heads=2, head_dim=64, page_len=16, max_pages=2, rotary_dim=8, lengths=(17, 4), num_new=(1, 1)
    )
    arguments = decode_attention_arguments(case)
    whole = run(arguments)
    # [B, 3, N, H] -> [B, devices, 3, N / devices, H]: a device's q, k and v lie together.
    qkv = arguments["qkv"].reshape(2, 3, num_devices, -1).swapaxes(1, 2).reshape(2, -1)

    def local(qkv, k_pages, v_pages, act):
        return custom_ops.decode_attention(
            qkv,
            arguments["rotary"],
            k_pages,
            v_pages,
            arguments["page_table"],
            arguments["lengths"],
            arguments["num_new"],
            act,
            semaphores=make_semaphores(),
            implementation="ffi",
        )[:3]

    columns, heads = PartitionSpec(None, "tensor"), PartitionSpec(None, "tensor", None, None)
    sharded = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(columns, heads, heads, columns),
            out_specs=(columns, heads, heads),
            check_vma=False,
        )
    )
    arrays = (qkv, arguments["k_pages"], arguments["v_pages"], arguments["act"])
    specs = (columns, heads, heads, columns)
    arrays = tuple(
        jax.device_put(array, jax.sharding.NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)
    )
    text = sharded.lower(*arrays).compile().as_text()
    assert text is not None
    assert "all-gather" not in text
    jax.tree.map(np.testing.assert_array_equal, tuple(map(in_f32, sharded(*arrays))), tuple(whole[:3]))


SMALL = DecodeAttentionCase(
    batch=2, heads=2, head_dim=64, page_len=16, max_pages=2, rotary_dim=8, lengths=(17, 4), num_new=(1, 1), dtype="bf16"
)


@with_library
def test_vmap_raises():
    arguments = decode_attention_arguments(SMALL)
    qkv = jnp.stack([arguments.pop("qkv")] * 2)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(
            lambda qkv: custom_ops.decode_attention(
                qkv, **arguments, semaphores=make_semaphores(), implementation="ffi"
            )
        )(qkv)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("ffi", marks=with_library)])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": jnp.zeros((2, 380), jnp.bfloat16)}, r"qkv must have shape \(2, 384\), got \(2, 380\)"),
        ({"qkv": jnp.zeros((2, 384), jnp.float32)}, "qkv must be bfloat16, got float32"),
        ({"k_pages": jnp.zeros((5, 2, 64), jnp.bfloat16)}, "k_pages must have 4 axes"),
        ({"v_pages": jnp.zeros((5, 2, 64, 16), jnp.bfloat16)}, r"v_pages must have shape \(5, 2, 16, 64\)"),
        ({"v_pages": jnp.zeros((5, 2, 16, 64), jnp.float16)}, "v_pages must be bfloat16, got float16"),
        ({"page_table": jnp.zeros((2, 2), jnp.uint32)}, "page_table must be int32, got uint32"),
        ({"page_table": jnp.zeros(4, jnp.int32)}, "page_table must have 2 axes"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, r"lengths must have shape \(2,\), got \(3,\)"),
        ({"num_new": jnp.zeros((2, 1), jnp.int32)}, r"num_new must have shape \(2,\), got \(2, 1\)"),
        ({"num_new": jnp.zeros(2, bool)}, "num_new must be int32, got bool"),
        ({"act": jnp.zeros((2, 127), jnp.bfloat16)}, r"act must have shape \(2, 128 or more\), got \(2, 127\)"),
        ({"act": jnp.zeros((2, 128), jnp.float32)}, "act must be bfloat16, got float32"),
        ({"rotary": (jnp.zeros((2, 33)), jnp.zeros((2, 33)))}, "at most head_dim = 64 values, got 66"),
        ({"rotary": (jnp.zeros((2, 4)), jnp.zeros((1, 4)))}, r"rotary\[1\] must have shape \(2, 4\), got \(1, 4\)"),
        ({"rotary": (jnp.zeros((2, 4)),) * 3}, r"rotary must be \(cos, sin\), got 3 arrays"),
        ({"implementation": "cudnn"}, "implementation must be 'reference' or 'ffi', got 'cudnn'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes, message, implementation):
    arguments = decode_attention_arguments(SMALL) | {"implementation": implementation} | changes
    with pytest.raises(ValueError, match=message):
        custom_ops.decode_attention(**arguments, semaphores=make_semaphores())


@with_library
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 48}, r"head_dim must be in \(64, 128, 256\), got 48"),
        ({"page_len": 24}, "page_len must be a multiple of 16, got 24"),
    ],
)
def test_what_the_kernels_do_not_support_is_refused_by_name(changes, message):
    arguments = decode_attention_arguments(dataclasses.replace(SMALL, **changes))
    with pytest.raises(ValueError, match=message):
        custom_ops.decode_attention(**arguments, semaphores=make_semaphores(), implementation="ffi")
    with pytest.raises(ValueError, match=r"semaphores must be given.*got None"):
        custom_ops.decode_attention(**decode_attention_arguments(SMALL), implementation="ffi")
