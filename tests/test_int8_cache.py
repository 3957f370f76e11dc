"""The INT8 cache: attention's ops over INT8 pages against sums in f64, with the quantisation's error bounded, and the
engine with ``kv_dtype="int8"`` against the one without."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import prefill_attention_cases
import pytest
import test_decode_attention
import test_prefill_attention
import tolerances
from op_cases import DecodeAttentionCase, case_id, decode_attention_arguments, decode_attention_oracle
from prefill_attention_cases import PrefillAttentionCase
from small_model import KERNEL_CONFIG, greedy, prompt

import custom_ops
from custom_ops import QuantizedArray, make_semaphores
from custom_ops.decode_attention import _attend_all_pages, _attend_page_after_page
from kogpt_jax import KoGPT, SamplingParams

# One key, 19, 99 and 989; page borders; finished rows; each head_dim and dtype.
CASES = [op_cases.read_cases("decode_attention")[index] for index in (0, 2, 3, 6)]
FP32_CASES = [op_cases.read_cases("decode_attention")[index] for index in (8, 9)]
HALF_ULP = {"fp32": 2.0**-24, "fp16": 2.0**-12, "bf16": 2.0**-9}
F32_ROUNDINGS = 2.0**-20  # of a scale, of a quotient, and of their product again


def with_int8_pages(arguments):
    """The same call over a quantised cache. Slots without a token hold what no token may meet: -128 and scales that are
    not finite."""
    pages = {}
    for name, poison in (("k_pages", np.nan), ("v_pages", np.inf)):
        values = np.asarray(arguments[name], np.float32)
        holds_token = ~np.isnan(values).any(axis=-1, keepdims=True)
        scale = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
        with np.errstate(invalid="ignore"):
            qvalue = np.where(holds_token, np.clip(np.round(values / scale), -127, 127), -128).astype(np.int8)
        pages[name] = QuantizedArray(jnp.asarray(qvalue), jnp.asarray(np.where(holds_token, scale, poison)))
    return arguments | pages


@functools.cache
def by_reference(case: DecodeAttentionCase):
    """Arguments in dtype, the same over INT8 pages, and what the reference makes of these."""
    exact = decode_attention_arguments(case)
    arguments = with_int8_pages(exact)
    return exact, arguments, run(arguments, "reference")


def run(arguments, implementation: str = "ffi"):
    """(act in f32, k_pages, v_pages, semaphores); what is aliased is given away."""
    arguments = dict(arguments)
    donated = {name: jax.tree.map(jnp.copy, arguments.pop(name)) for name in test_decode_attention.ALIASED}
    act, *pages, semaphores = test_decode_attention._call(
        donated, make_semaphores(), arguments, implementation=implementation
    )
    return (
        test_decode_attention.in_f32(act),
        *(jax.tree.map(np.asarray, part) for part in pages),
        np.asarray(semaphores),
    )


def dequantized(pages: QuantizedArray) -> np.ndarray:
    """In f64."""
    return np.asarray(pages.qvalue, np.float64) * np.asarray(pages.scale, np.float64)


def check_rounding(pages: QuantizedArray, expected: np.ndarray, dtype: str, what: str) -> None:
    """INT8 heads [..., H] of what is ``expected`` before it is rounded to dtype: as near as half a step of a scale
    that spans no more than the largest value, and no -128."""
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    rounding = HALF_ULP[dtype] * 2 * largest  # the rotation's two products in f32 and dtype
    scale = np.asarray(pages.scale, np.float64)
    assert np.abs(pages.qvalue.astype(int)).max() <= 127
    assert (np.abs(pages.qvalue.astype(int)).max(axis=-1, keepdims=True)[largest > 0] == 127).all(), what
    assert (scale <= (largest + rounding) / 127 * (1 + F32_ROUNDINGS)).all(), what
    error = np.abs(dequantized(pages) - expected)
    assert (error <= scale / 2 * (1 + F32_ROUNDINGS) + 127 * F32_ROUNDINGS * scale + rounding).all(), what


def attention_of(case: DecodeAttentionCase, arguments, k_pages: np.ndarray, v_pages: np.ndarray) -> np.ndarray:
    """Attention's output in f64 over pages that hold the new token already; q is rounded, as the contract has it."""
    q = op_cases.rotated_qkv(case, arguments)[0]
    q = np.asarray(jnp.asarray(q, jnp.float32).astype(op_cases.DTYPES[case.dtype]), np.float64)
    out = np.zeros((case.batch, case.heads, case.head_dim))
    for row in map(int, np.flatnonzero(case.num_new)):
        keys, values = (op_cases.keys_of(case, arguments, pages, row) for pages in (k_pages, v_pages))
        out[row] = np.einsum("ns,nsh->nh", op_cases.softmax_of(q[row], keys), values)
    return out.reshape(case.batch, -1)


def quantization_bound(case: DecodeAttentionCase, exact_arguments, results) -> np.ndarray:
    """How far INT8 may move attention's output.

    A key that is off by half a step s_k / 2 in each value moves its score by at most e = |q|_1 s_k / 2 / sqrt(H), so
    a softmax of scores that are off by at most e has weights within a factor exp(2 e) of the exact p. Hence, about
    any centre, here the exact output o, the sum moves by (exp(2 e) - 1) sum p |v - o|, and the steps of the values add
    exp(2 e) sum p s_v / 2.
    """
    q = op_cases.rotated_qkv(case, exact_arguments)[0]
    out, k_pages, v_pages = decode_attention_oracle(case, exact_arguments)
    bound = np.zeros((case.batch, case.heads, case.head_dim))
    for row in map(int, np.flatnonzero(case.num_new)):
        keys, values = (op_cases.keys_of(case, exact_arguments, pages, row) for pages in (k_pages, v_pages))
        k_scale, v_scale = (
            op_cases.keys_of(case, exact_arguments, np.asarray(pages.scale, np.float64), row)[..., 0]
            for pages in results[1:3]
        )
        probs = op_cases.softmax_of(q[row], keys)
        change = (np.abs(q[row]).sum(axis=-1)[:, None] * k_scale / 2 / np.sqrt(case.head_dim)).max(axis=-1)
        factor = np.exp(2 * change)[:, None]
        spread = np.einsum("ns,nsh->nh", probs, np.abs(values - out[row].reshape(case.heads, 1, -1)))
        bound[row] = (factor - 1) * spread + factor * (probs * v_scale).sum(axis=-1)[:, None] / 2
    return bound.reshape(case.batch, -1)


def check_result(case: DecodeAttentionCase, exact_arguments, arguments, results, tolerance, what: str) -> None:
    """The output over the pages as they were written, the rounding of the new tokens, and no other bit changed."""
    act, k_pages, v_pages, semaphores = results
    width = case.heads * case.head_dim
    out = attention_of(case, arguments, dequantized(k_pages), dequantized(v_pages))
    tolerances.assert_close(act[:, :width], out, tolerance, what)
    np.testing.assert_array_equal(act[:, width:], test_decode_attention.in_f32(arguments["act"])[:, width:])
    assert not np.any(semaphores)

    where = test_decode_attention.is_appended(case, arguments)[:-1]  # the last page is scratch
    _, *new = op_cases.rotated_qkv(case, arguments)
    for name, pages, expected in (("k_pages", k_pages, new[0]), ("v_pages", v_pages, new[1])):
        for part in ("qvalue", "scale"):
            before, after = (np.asarray(getattr(each, part))[:-1] for each in (arguments[name], pages))
            untouched = np.broadcast_to(~where[:, None, :, None], before.shape)
            np.testing.assert_array_equal(after[untouched], before[untouched])
        for row in map(int, np.flatnonzero(case.num_new)):
            page = arguments["page_table"][row, case.lengths[row] // case.page_len]
            of_token = jax.tree.map(
                lambda part, page=page, row=row: part[page, :, case.lengths[row] % case.page_len], pages
            )
            check_rounding(of_token, expected[row], case.dtype, f"{what}: {name}")

    exact = decode_attention_oracle(case, exact_arguments)[0]
    floor = tolerances.MODULE[case.dtype].relative * np.abs(exact).max(axis=-1, keepdims=True)
    assert (np.abs(act[:, :width] - exact) <= quantization_bound(case, exact_arguments, results) + floor).all(), what


@pytest.mark.parametrize("case", CASES + FP32_CASES, ids=case_id)
def test_decode_reference_against_f64(case):
    exact, arguments, results = by_reference(case)
    check_result(case, exact, arguments, results, tolerances.MODULE[case.dtype], "reference")


@pytest.mark.host
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_decode_error_is_at_most_twice_the_references(case):
    check_errors(case)


@pytest.mark.host
@pytest.mark.parametrize("case", FP32_CASES, ids=case_id)
def test_decode_error_in_f32_is_at_most_twice_the_references(case):
    check_errors(case)


def check_errors(case: DecodeAttentionCase) -> None:
    exact, arguments, (act, k_pages, v_pages, _) = by_reference(case)
    out = attention_of(case, arguments, dequantized(k_pages), dequantized(v_pages))
    error = tolerances.relative_error(act[:, : out.shape[1]], out)
    tolerance = tolerances.twice_the_references_error(error, case.dtype)
    for name in op_cases.instruction_sets():
        op_cases.limit_instruction_set(name)
        results = run(arguments)
        check_result(case, exact, arguments, results, tolerance, f"on {name}")
        jax.tree.map(np.testing.assert_array_equal, results, run(arguments))


@pytest.mark.parametrize("attend", [_attend_all_pages, _attend_page_after_page], ids=lambda f: f.__name__)
def test_both_ways_of_the_reference(attend):
    """Each platform runs one of the two. In fp16, with values so small that a weight times a scale is no fp16."""
    case = DecodeAttentionCase(
        batch=3, heads=3, head_dim=24, page_len=64, max_pages=2, lengths=(0, 63, 98), num_new=(1,) * 3, dtype="fp16"
    )
    arguments = decode_attention_arguments(case)
    arguments["v_pages"] *= 2.0**-12
    arguments["qkv"] = arguments["qkv"].at[:, 2 * case.heads * case.head_dim :].multiply(2.0**-12)
    arguments = with_int8_pages(arguments)
    _, k_pages, v_pages, _ = run(arguments, "reference")
    q = arguments["qkv"].reshape(3, 3, 3, 24)[:, 0]
    out = jax.jit(attend)(q, k_pages, v_pages, arguments["page_table"], arguments["lengths"] + 1)
    assert out.dtype == jnp.float16
    expected = attention_of(case, arguments, dequantized(k_pages), dequantized(v_pages))
    tolerances.assert_close(np.asarray(out).reshape(3, -1), expected, tolerances.MODULE["fp16"])


@pytest.mark.host
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_row_is_the_same_bits_in_every_batch(head_dim):
    rng = np.random.default_rng(2)
    lengths = tuple(int(length) for length in rng.integers(0, 320, 16))
    case = DecodeAttentionCase(
        batch=16,
        heads=2,
        head_dim=head_dim,
        page_len=64,
        max_pages=5,
        rotary_dim=32,
        lengths=lengths,
        num_new=(1,) * 16,
    )
    arguments = with_int8_pages(decode_attention_arguments(case))
    for name in op_cases.instruction_sets():
        op_cases.limit_instruction_set(name)
        expected = run(arguments)[0]
        assert np.all(np.isfinite(expected))
        for chosen in ([0], [5], [15], rng.permutation(16)[:7], rng.permutation(16)):
            rows = test_decode_attention.rows_of(arguments, np.asarray(chosen))
            np.testing.assert_array_equal(run(rows)[0], expected[np.asarray(chosen)])


SMALL = dataclasses.replace(test_decode_attention.SMALL, head_dim=64, dtype="fp32")
IMPLEMENTATIONS = ["reference", pytest.param("ffi", marks=pytest.mark.host)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_head_that_is_not_finite_shows_and_one_of_zeros_does_not(implementation):
    """Of row 0 the first head's k or v; of row 1 all k and v are zeros."""
    arguments = with_int8_pages(decode_attention_arguments(dataclasses.replace(SMALL, dtype="bf16")))
    width = SMALL.heads * SMALL.head_dim
    qkv = arguments["qkv"].at[1, width:].set(0)
    for column in (width + 5, 2 * width + 5):
        for value in (np.nan, np.inf, -np.inf):
            act, k_pages, v_pages, _ = run(arguments | {"qkv": qkv.at[0, column].set(value)}, implementation)
            assert np.isnan(act[0, : SMALL.head_dim]).any()
            assert np.isfinite(act[0, SMALL.head_dim :]).all()
            assert np.isfinite(act[1]).all()
            page, slot = arguments["page_table"][1, 0], SMALL.lengths[1]
            for pages in (k_pages, v_pages):
                assert not pages.qvalue[page, :, slot].any()
                assert (pages.scale[page, :, slot] == 1).all()


def refused_pages():
    quantized = with_int8_pages(decode_attention_arguments(SMALL))
    values, scale = quantized["k_pages"].qvalue, quantized["k_pages"].scale
    floats = decode_attention_arguments(SMALL)
    for name, other in (("k_pages", "v_pages"), ("v_pages", "k_pages")):
        good = {other: quantized[other]}
        yield good | {name: QuantizedArray(values.astype(jnp.int16), scale)}, f"{name}.qvalue must be int8, got int16"
        yield (
            good | {name: QuantizedArray(values, scale.astype(jnp.bfloat16))},
            f"{name}.scale must be float32, got bfl",
        )
        yield good | {name: QuantizedArray(values, scale[..., 0])}, rf"{name}.scale must have shape \(5, 2, 16, 1\)"
        yield good | {name: QuantizedArray(values, jnp.repeat(scale, 64, 3))}, rf"{name}.scale must have shape"
    yield {"k_pages": quantized["k_pages"], "v_pages": floats["v_pages"]}, "v_pages must be a QuantizedArray as k_pages"
    yield {"k_pages": floats["k_pages"], "v_pages": quantized["v_pages"]}, "v_pages must be float32 as k_pages is"
    yield {"k_pages": values, "v_pages": values}, "k_pages must be float32 or float16 or bfloat16, got int8"
    int8_pages = {name: quantized[name] for name in ("k_pages", "v_pages")}
    yield int8_pages | {"qkv": floats["qkv"].astype(jnp.int8)}, "qkv must be float32 or float16 or bfloat16, got int8"
    yield int8_pages | {"act": floats["act"].astype(jnp.bfloat16)}, "act must be float32, got bfloat16"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pages_that_do_not_fit_are_refused_by_name(implementation):
    for changes, message in refused_pages():
        with pytest.raises(ValueError, match=message):
            custom_ops.decode_attention(
                **decode_attention_arguments(SMALL) | changes,
                semaphores=make_semaphores(),
                implementation=implementation,
            )


# -- prefill_attention ------------------------------------------------------------------------------------------------


PREFILL = PrefillAttentionCase(
    total_tokens=150,
    heads=2,
    head_dim=24,
    page_len=16,
    max_pages=10,
    begins=(1, 70, 89, 100),
    num_new=(49, 19, 1, 49),
    lengths=(17, 40, 159, 0),
    rotary_dim=8,
    act_dim=50,
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _prefill(arguments, max_new, implementation):
    return custom_ops.prefill_attention(**arguments, max_new=max_new, implementation=implementation)


def run_prefill(arguments, max_new: int | None = None, implementation: str = "reference"):
    """(act in f32, k_pages, v_pages)."""
    results = _prefill(arguments, max_new, implementation)
    act, *pages = results[:3]
    return test_prefill_attention.in_f32(act), *(jax.tree.map(np.asarray, part) for part in pages)


def prefill_over_pages(case: PrefillAttentionCase, arguments, results) -> np.ndarray:
    """In f64, by head, over the pages as they were written."""
    pages = map(dequantized, results[1:])
    return test_prefill_attention.by_head(case, prefill_attention_cases.attention_of(case, arguments, *pages))


def check_prefill(case: PrefillAttentionCase, arguments, results, tolerance, what: str) -> None:
    """The output over the pages as they were written, the rounding of the new tokens, and no other bit changed."""
    act, *pages = results
    if any(case.num_new):
        out = prefill_over_pages(case, arguments, results)
        tolerances.assert_close(test_prefill_attention.by_head(case, act), out, tolerance, what)
    is_of_row = np.zeros(case.total_tokens, bool)
    is_new = np.zeros((arguments["k_pages"].shape[0], case.page_len), bool)
    _, *new = prefill_attention_cases.rotated_qkv(case, arguments)
    for row, (begin, num_new) in enumerate(zip(case.begins, case.num_new, strict=True)):
        if num_new == 0:
            continue
        is_of_row[begin : begin + num_new] = True
        slots = prefill_attention_cases.new_slots(case, arguments, row)
        is_new[slots[0], slots[2]] = True
        for name, written, expected in zip(("k_pages", "v_pages"), pages, new, strict=True):
            of_row = jax.tree.map(lambda part, slots=slots: part[slots], written)
            check_rounding(of_row, expected[begin : begin + num_new], case.dtype, f"{what}: {name}")
    assert np.isnan(act[~is_of_row]).all()
    assert np.isnan(act[:, case.width :]).all()
    for name, written in zip(("k_pages", "v_pages"), pages, strict=True):
        for part in ("qvalue", "scale"):
            before, after = (np.asarray(getattr(each, part))[:-1] for each in (arguments[name], written))
            untouched = np.broadcast_to(~is_new[:-1, None, :, None], before.shape)  # the last page is scratch
            np.testing.assert_array_equal(after[untouched], before[untouched])


def check_errors_of_the_prefill_kernels(case: PrefillAttentionCase) -> None:
    """The output's at most twice the reference's own, each over its own pages; and every run the same bits."""
    arguments = with_int8_pages(prefill_attention_cases.arguments_of(case))
    max_new = case.max_new or max(case.num_new)
    reference_error = 0.0
    if any(case.num_new):
        results = run_prefill(arguments, max_new)
        act = test_prefill_attention.by_head(case, results[0])
        reference_error = tolerances.relative_error(act, prefill_over_pages(case, arguments, results))
    results = run_prefill(arguments, max_new, "ffi")
    tolerance = tolerances.twice_the_references_error(reference_error, case.dtype)
    check_prefill(case, arguments, results, tolerance, "ffi")
    for again in (max_new, None):
        jax.tree.map(np.testing.assert_array_equal, results, run_prefill(arguments, again, "ffi"))


# Unlike rows with a prefix; tokens of no row; each dtype.
PREFILL_CASES = [prefill_attention_cases.read_cases()[index] for index in (1, 2, 7, 9, 14)]


@pytest.mark.parametrize("case", PREFILL_CASES, ids=prefill_attention_cases.case_id)
def test_prefill_reference_against_f64(case):
    arguments = with_int8_pages(prefill_attention_cases.arguments_of(case))
    results = run_prefill(arguments, case.max_new or max(case.num_new))
    check_prefill(case, arguments, results, tolerances.MODULE[case.dtype], "reference")


def test_prefill_shows_a_head_that_is_not_finite_and_not_one_of_zeros():
    check_that_a_head_that_is_not_finite_shows("reference")


def check_that_a_head_that_is_not_finite_shows(implementation: str) -> None:
    """Of row 0 the first head's k or v of the token in the middle, from there on; of row 1 all k and v are zeros."""
    case = dataclasses.replace(test_prefill_attention.SMALL, rotary_dim=0)
    arguments = with_int8_pages(prefill_attention_cases.arguments_of(case))
    middle = case.begins[0] + case.num_new[0] // 2
    row0, row1 = (slice(begin, begin + count) for begin, count in zip(case.begins, case.num_new, strict=True))
    qkv = arguments["qkv"].at[row1, case.width :].set(0)
    for column in (case.width + 5, 2 * case.width + 5):
        for value in (np.nan, np.inf, -np.inf):
            changed = arguments | {"qkv": qkv.at[middle, column].set(value)}
            act, *pages = run_prefill(changed, None, implementation)
            assert np.isnan(act[middle : row0.stop, : case.head_dim]).any(axis=-1).all()
            assert np.isfinite(act[row0, case.head_dim : case.width]).all()
            assert np.isfinite(act[row1, : case.width]).all()
            slots = prefill_attention_cases.new_slots(case, changed, 1)
            for written in pages:
                assert not written.qvalue[slots].any()
                assert (written.scale[slots] == 1).all()


def assert_same_pages(actual: QuantizedArray, expected: QuantizedArray) -> None:
    """Two programs may round the rotation and the scale the other way, and then now and then an integer."""
    np.testing.assert_allclose(actual.scale[:-1], expected.scale[:-1], rtol=2.0**-22)
    steps = np.abs(actual.qvalue[:-1].astype(int) - np.asarray(expected.qvalue)[:-1])
    assert steps.max() <= 1
    assert steps.mean() < 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_prefill_is_decoding_one_token_after_another(dtype):
    """Each new token of each row, with those before it in the cache, is a call of `decode_attention`: what they write
    and give is the same within rounding. Slots and tokens of no row stay as they are."""
    case = dataclasses.replace(PREFILL, dtype=dtype)
    arguments = with_int8_pages(prefill_attention_cases.arguments_of(case))
    act, *pages = run_prefill(arguments, max(case.num_new))
    expected = np.asarray(arguments["act"]).astype(np.float32)
    decode = jax.jit(custom_ops.decode_attention, static_argnames="implementation")
    k_pages, v_pages = arguments["k_pages"], arguments["v_pages"]
    for step in range(max(case.num_new)):
        is_running = step < np.asarray(case.num_new)
        tokens = np.where(is_running, np.asarray(case.begins) + step, 0)
        of_step, k_pages, v_pages, _ = decode(
            arguments["qkv"][tokens],
            tuple(table[tokens] for table in arguments["rotary"]),
            k_pages,
            v_pages,
            arguments["page_table"],
            arguments["lengths"] + np.minimum(step, np.asarray(case.num_new)).astype(np.int32),
            jnp.asarray(is_running, jnp.int32),
            arguments["act"][tokens],
            implementation="reference",
        )
        expected[tokens[is_running]] = np.asarray(of_step).astype(np.float32)[is_running]
    for written, one_by_one in zip(pages, (k_pages, v_pages), strict=True):
        assert_same_pages(written, one_by_one)
    np.testing.assert_array_equal(np.isnan(act), np.isnan(expected))
    by_head = [test_prefill_attention.by_head(case, result) for result in (act, expected)]
    tolerances.assert_close(by_head[0], by_head[1], tolerances.MODULE[dtype])


def test_a_prompt_in_chunks_is_the_whole_prompt():
    case = dataclasses.replace(PREFILL, total_tokens=140, begins=(0,), num_new=(140,), lengths=(0,), dtype="fp32")
    arguments = with_int8_pages(prefill_attention_cases.arguments_of(case))
    act, *whole = run_prefill(arguments)
    pages = {name: arguments[name] for name in ("k_pages", "v_pages")}
    for begin, end in ((0, 65), (65, 140)):
        counts = {"begins": [begin], "num_new": [end - begin], "lengths": [begin]}
        chunk = arguments | pages | {name: jnp.asarray(value, jnp.int32) for name, value in counts.items()}
        of_chunk, *of_pages = run_prefill(chunk, end - begin)
        tolerances.assert_close(of_chunk[begin:end, :48], act[begin:end, :48], tolerances.CACHED_VS_WHOLE["fp32"])
        pages = dict(zip(("k_pages", "v_pages"), of_pages, strict=True))
    for name, written in zip(("k_pages", "v_pages"), whole, strict=True):
        assert_same_pages(written, pages[name])


# -- The engine -------------------------------------------------------------------------------------------------------

PERPLEXITY_CHANGE = 0.003  # what the demo model may lose, relative
TOKENS = 40


@pytest.fixture(scope="module")
def demo() -> KoGPT:
    return KoGPT.from_pretrained("demo", dtype="fp32")


def with_int8_cache(engine: KoGPT, **options: Any) -> KoGPT:
    config = dataclasses.replace(engine.config, kv_dtype="int8")
    return KoGPT(config, engine.leaves, engine.mesh, engine.tokenizer, **options)


@pytest.fixture(scope="module")
def texts(demo) -> list[list[int]]:
    """Drawn from the demo model: held-out text is not part of the repository."""
    prompts = [demo.tokenizer.encode(text) for text in ("이 영화는", "배우들의 연기가", "음악이 너무", "스토리가")] * 2
    params = [
        SamplingParams(max_new_tokens=2 * TOKENS, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(8)
    ]
    completions = demo.generate_ids(prompts, params)
    return [[*row, *completion.token_ids] for row, completion in zip(prompts, completions, strict=True)]


def logprobs_of(engine: KoGPT, texts: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(score.logprobs[1:], np.float64) for score in engine.score_ids(texts)])


@pytest.mark.slow
def test_the_demo_model_loses_little(demo, texts):
    """Perplexity, and where a greedy text takes another token, that INT8 moves log-probabilities that much."""
    int8 = with_int8_cache(demo)
    exact, rounded = logprobs_of(demo, texts), logprobs_of(int8, texts)
    assert exact.size > 600
    change = np.abs(rounded - exact)
    assert change.max() > 1e-4, "the scores do not come from an INT8 cache"
    assert abs(np.expm1(exact.mean() - rounded.mean())) <= PERPLEXITY_CHANGE

    prompts = [text[:TOKENS] for text in texts]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    num_same = 0
    for row, theirs, ours in zip(
        prompts, demo.generate_ids(prompts, params), int8.generate_ids(prompts, params), strict=True
    ):
        pairs = zip(theirs.token_ids, ours.token_ids, strict=True)
        step = next((index for index, (a, b) in enumerate(pairs) if a != b), 24)
        num_same += step
        if step < 24:
            both = [[*row, *tokens[: step + 1]] for tokens in (theirs.token_ids, ours.token_ids)]
            best, taken = (score.logprobs[-1] for score in demo.score_ids(both))
            assert best - taken <= 2 * change.max()
    assert num_same >= len(prompts) * 24 / 2


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoding_over_int8_pages_is_scoring_over_them(demo, texts, implementation):
    engine = with_int8_cache(demo, implementation=implementation)
    prompts = [text[:TOKENS] for text in texts]
    completions = engine.generate_ids(prompts, SamplingParams(max_new_tokens=12, ignore_eos=True))
    whole = [[*row, *completion.token_ids] for row, completion in zip(prompts, completions, strict=True)]
    for completion, score in zip(completions, engine.score_ids(whole), strict=True):
        scored = np.asarray(score.logprobs[TOKENS:], np.float64)
        tolerances.assert_close(completion.logprobs, scored, tolerances.CACHED_VS_WHOLE_INT8)


@pytest.mark.slow
def test_an_int8_cache_on_a_mesh():
    """Rows and heads cut over four devices: scales go where their heads go."""
    config = dataclasses.replace(KERNEL_CONFIG, kv_dtype="int8")
    prompts = [prompt(3), prompt(70)]
    completions, alone = (
        KoGPT.from_random(config, mesh=mesh).generate_ids(prompts, greedy(6)) for mesh in ("d2p1t2", "d1p1t1")
    )
    for completion, expected in zip(completions, alone, strict=True):
        assert completion.token_ids == expected.token_ids
        tolerances.assert_close(completion.logprobs, expected.logprobs, tolerances.CACHED_VS_WHOLE_INT8)
