"""`decode_layers` beside the ops that it consists of: the same bits through the kernels, the reference within
tolerance, and one clear error for what does not fit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec

from custom_ops import (
    MAX_EARLY_ROWS_INT8,
    DecodeHead,
    DecodeLayer,
    EarlyColumns,
    LayerNorm,
    QuantizedArray,
    _arguments,
    all_reduce,
    decode_attention,
    decode_layers,
    linear,
    make_semaphores,
    quantize_weight,
)
from kogpt_jax.sharding import make_mesh

EPSILON = 1e-5
DIM, FFN, HEADS, HEAD_DIM, VOCAB = 128, 192, 2, 64, 300
PAGE_LEN, NUM_PAGES = 16, 9
DTYPES = {"fp32": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}


@dataclasses.dataclass
class Case:
    """Arguments of a call, random and heavy-tailed."""

    x: jax.Array
    layers: list[DecodeLayer]
    rotary: tuple[jax.Array, jax.Array]
    k_pages: list[Any]
    v_pages: list[Any]
    page_table: jax.Array
    lengths: jax.Array
    num_new: jax.Array
    head: DecodeHead
    int8_activations: bool = False

    def arguments(self, rows: Any = slice(None)) -> tuple[Any, ...]:
        """Of some rows alone."""
        rotary = tuple(table[rows] for table in self.rotary)
        of_rows = (self.page_table[rows], self.lengths[rows], self.num_new[rows])
        return self.x[rows], self.layers, rotary, self.k_pages, self.v_pages, *of_rows

    def of_rows(self, rows: Any) -> "Case":
        """The same call for some rows."""
        x, _, rotary, _, _, page_table, lengths, num_new = self.arguments(rows)
        return dataclasses.replace(self, x=x, rotary=rotary, page_table=page_table, lengths=lengths, num_new=num_new)


def make_case(
    dtype: str,
    *,
    quant: bool = False,
    int8_cache: bool = False,
    multiplier: bool = False,
    int8_activations: bool = False,
    num_layers: int = 3,
    vocab: int = VOCAB,
    head_dim: int = HEAD_DIM,
) -> Case:
    rng = np.random.default_rng(7)

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0, kind: Any = DTYPES[dtype]) -> jax.Array:
        return jnp.asarray(mean + scale * rng.standard_t(5, shape), kind)

    def matrix(outputs: int, k: int) -> jax.Array | QuantizedArray:
        weight = draw(outputs, k, scale=k**-0.5)
        return quantize_weight(weight) if quant else weight

    attention_dim = HEADS * head_dim
    layers: list[DecodeLayer] = []
    k_pages: list[Any] = []
    v_pages: list[Any] = []
    for _ in range(num_layers):
        scales = jnp.asarray(np.exp(0.3 * rng.normal(size=attention_dim + FFN)), jnp.float32)
        layers.append(
            DecodeLayer(
                ln_scale=draw(DIM, scale=0.1, mean=1),
                ln_bias=draw(DIM, scale=0.1),
                w_in=matrix(3 * attention_dim + FFN, DIM),
                b_ffn_in=draw(FFN, scale=0.1),
                w_out=matrix(DIM, attention_dim + FFN),
                k_multiplier=scales if multiplier else None,
                b_ffn_out=draw(DIM, scale=0.1),
            )
        )
        for pages in (k_pages, v_pages):
            values = draw(NUM_PAGES, HEADS, PAGE_LEN, head_dim)
            pages.append(quantize_weight(values) if int8_cache else values)
    lengths = jnp.asarray([0, 17, 31], jnp.int32)
    angles = np.asarray(lengths)[:, None] * 100.0 ** -np.linspace(0, 1, 8)
    return Case(
        x=draw(3, DIM, kind=jnp.float32),
        layers=layers,
        rotary=(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)),
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=jnp.asarray([[4, 0], [1, 7], [2, 5]], jnp.int32),
        lengths=lengths,
        num_new=jnp.asarray([1, 1, 0], jnp.int32),
        head=DecodeHead(draw(DIM, scale=0.1, mean=1), draw(DIM, scale=0.1), matrix(vocab, DIM), draw(vocab, scale=0.1)),
        int8_activations=int8_activations,
    )


def op_by_op(case: Case, device_groups: Any = ()) -> tuple[Any, ...]:
    """The kernels one by one, as `kogpt_jax.model` calls them where they are not one call; with groups of devices,
    whose products are summed over "tensor"."""
    semaphores = make_semaphores()
    x, k_pages, v_pages = case.x, [], []
    _, num_heads, _, head_dim = case.k_pages[0].shape
    attention_dim = num_heads * head_dim
    options: dict[str, Any] = {"prefetch_weight": True, "implementation": "ffi"}
    for number, layer in enumerate(case.layers, start=1):
        is_early = layer.k_multiplier is None
        is_int8 = isinstance(layer.w_in, QuantizedArray)
        qkv, act, semaphores = linear(
            x,
            layer.w_in,
            semaphores=semaphores,
            layer_norm=LayerNorm(layer.ln_scale, layer.ln_bias, EPSILON),
            bias=layer.b_ffn_in,
            gelu_from=3 * attention_dim,
            act_dim=layer.w_out.shape[1],
            done_mark=number if is_early else 0,
            int8_activations=case.int8_activations,
            **options,
        )
        act, k, v, semaphores = decode_attention(
            qkv,
            case.rotary,
            case.k_pages[number - 1],
            case.v_pages[number - 1],
            case.page_table,
            case.lengths,
            case.num_new,
            act,
            semaphores=semaphores,
            prefetch_cache=True,
            leaves_room=is_early and (not is_int8 or len(x) <= MAX_EARLY_ROWS_INT8),
            implementation="ffi",
        )
        terms: dict[str, Any] = {"bias": layer.b_ffn_out, "residual": x}
        x, semaphores = linear(
            act,
            layer.w_out,
            semaphores=semaphores,
            k_multiplier=layer.k_multiplier,
            early=EarlyColumns(attention_dim, number) if is_early else None,
            int8_activations=case.int8_activations,
            **({"out_dtype": jnp.float32} if device_groups else terms),
            **options,
        )
        if device_groups:
            x = all_reduce(x, "tensor", device_groups=device_groups, implementation="ffi", **terms)
        k_pages.append(k)
        v_pages.append(v)
    head = case.head
    logits, _ = linear(
        x,
        head.lm_head,
        semaphores=semaphores,
        layer_norm=LayerNorm(head.ln_scale, head.ln_bias, EPSILON),
        bias=head.bias,
        out_dtype=jnp.float32,
        **options,
    )
    return x, logits, k_pages, v_pages


def run(case: Case, implementation: str, **options: Any) -> tuple[Any, ...]:
    """What a jitted call gives, all but the semaphores."""
    rows = options.pop("rows", slice(None))
    options = {"head": case.head, "epsilon": EPSILON, "int8_activations": case.int8_activations, **options}
    semaphores = make_semaphores()

    def call(x, layers, rotary, k_pages, v_pages, page_table, lengths, num_new, head, semaphores):
        rest: dict[str, Any] = options | {"head": head, "semaphores": semaphores, "implementation": implementation}
        return decode_layers(x, layers, rotary, k_pages, v_pages, page_table, lengths, num_new, **rest)[:4]

    return jax.jit(call)(*case.arguments(rows), options["head"], semaphores)


def with_int8(layer: DecodeLayer) -> DecodeLayer:
    assert not isinstance(layer.w_in, QuantizedArray)
    return layer._replace(w_in=quantize_weight(layer.w_in))


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


KINDS: list[dict[str, bool]] = [{}, {"quant": True, "multiplier": True}, {"quant": True, "int8_cache": True}]
# Of these the kernels for sm_90a round more than the reference.
ROUNDED_KINDS: list[dict[str, bool]] = [
    {"quant": True, "int8_activations": True},
    {"quant": True, "int8_activations": True, "multiplier": True},
]


def kind_id(kind: Any) -> str | None:
    return "-".join(kind) or "plain" if isinstance(kind, dict) else None


@pytest.mark.host
@pytest.mark.parametrize("kind", KINDS + ROUNDED_KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_one_call_gives_the_bits_of_its_ops(dtype, kind):
    """Of several rows and of one, which INT8 products take in another way, and of heads as large as a group of columns
    that has a scale."""
    whole = make_case(dtype, **kind)
    for case in (whole, whole.of_rows(slice(1, 2)), make_case(dtype, **kind, head_dim=256)):
        expected = jax.jit(lambda case=case: op_by_op(case))()
        for _ in range(3):  # the second time what is kept of the first, with arrays that lie elsewhere, too
            assert_same_bits(run(case, "ffi"), expected)


@pytest.mark.host
@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("length", [70, 600])
def test_long_rows_have_the_bits_of_the_ops(length, int8_activations, int8_cache):
    """On Hopper attention rounds what `w_out` takes, where the heads of a long row go to several blocks: to two that
    are a cluster, and to ten of which the one that ends last has the result."""
    case = make_case("bf16", quant=True, int8_cache=int8_cache, int8_activations=int8_activations, head_dim=256)
    last = length // PAGE_LEN
    table = np.tile([[4], [1], [2]], last + 1)
    table[1, 1], table[2, last] = 7, 8  # a page for each row's new token
    case = dataclasses.replace(
        case,
        page_table=jnp.asarray(table, jnp.int32),
        lengths=jnp.asarray([0, 17, length], jnp.int32),
        num_new=jnp.ones(3, jnp.int32),
    )
    assert_same_bits(run(case, "ffi"), jax.jit(lambda: op_by_op(case))())


@pytest.mark.host
@pytest.mark.parametrize("kind", KINDS + ROUNDED_KINDS, ids=kind_id)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_reference_says_the_same(dtype, kind):
    """Of rows that run; what a finished one's x holds means nothing, but it is the same too."""
    case = make_case(dtype, **kind)
    found, expected = run(case, "ffi"), run(case, "reference")
    rounds = case.int8_activations and jax.default_backend() == "gpu"
    rule = tolerances.STEP_OF_INT8_KERNELS if rounds else tolerances.STEP_OF_KERNELS[dtype]
    for a, b in zip(found[:2], expected[:2], strict=True):
        tolerances.assert_close(a, b, rule)
    for index, (a, b) in enumerate(zip(jax.tree.leaves(found[2:]), jax.tree.leaves(expected[2:]), strict=True)):
        untouched = np.setdiff1d(np.arange(NUM_PAGES), [4, 7, NUM_PAGES - 1])
        np.testing.assert_array_equal(np.asarray(a)[untouched], np.asarray(b)[untouched], err_msg=str(index))


@pytest.mark.host
@pytest.mark.parametrize("kind", ROUNDED_KINDS, ids=kind_id)
def test_a_cpu_rounds_nothing_more(kind):
    """And a row has the same bits alone."""
    case = make_case("fp16", **kind)
    found = run(case, "ffi")
    assert_same_bits(found, run(dataclasses.replace(case, int8_activations=False), "ffi"))
    check_rows_alone(case, found)


def check_rows_alone(case: Case, found: tuple[Any, ...]) -> None:
    for row in range(2):
        alone = run(case, "ffi", rows=slice(row, row + 1))
        for name, value, among in zip(("x", "logits"), alone, found, strict=False):
            np.testing.assert_array_equal(np.asarray(value)[0], np.asarray(among)[row], err_msg=name)


@pytest.mark.host
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_row_alone_has_the_same_bits_and_a_head_is_optional(num_layers):
    case = make_case("fp16", quant=False, int8_cache=False, num_layers=num_layers)
    x, *_ = found = run(case, "ffi")
    check_rows_alone(case, found)
    for implementation in ("ffi", "reference"):
        headless = run(case, implementation, head=None)
        assert headless[1] is None
        tolerances.assert_close(headless[0], x, tolerances.STEP_OF_KERNELS["fp16"])
    np.testing.assert_array_equal(np.asarray(run(case, "ffi", head=None)[0]), np.asarray(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: {"x": case.x[0]}, "x must have 2 axes"),
        (lambda case: {"x": case.x.astype(jnp.float16)}, "x must be float32, got float16"),
        (lambda case: {"layers": []}, "pages of keys and of values for each layer, at least one: got 0 layers"),
        (lambda case: {"k_pages": case.k_pages[:2]}, "got 3 layers, 2 and 3 pages"),
        (lambda case: {"page_table": case.page_table[:2]}, r"page_table must have shape \(3, 2\), got \(2, 2\)"),
        (
            lambda case: {"v_pages": [*case.v_pages[:2], case.v_pages[2][1:]]},
            r"v_pages of layer 2 must have shape \(9, 2, 16, 64\), got \(8, 2, 16, 64\)",
        ),
        (
            lambda case: {"k_pages": [case.k_pages[0], quantize_weight(case.k_pages[1]), case.k_pages[2]]},
            "k_pages of layer 1 must be INT8 where k_pages of layer 0 are",
        ),
        (
            lambda case: {"layers": [*case.layers[:2], case.layers[2]._replace(b_ffn_out=case.layers[2].ln_bias[1:])]},
            r"b_ffn_out of layer 2 must have shape \(128,\), got \(127,\)",
        ),
        (
            lambda case: {"layers": [*case.layers[:2], with_int8(case.layers[2])]},
            "w_in of layer 2 must be quantised where that of layer 0 is",
        ),
        (
            lambda case: {"rotary": (case.rotary[0], case.rotary[1][:2])},
            r"rotary\[1\] must have shape \(3, 8\), got \(2, 8\)",
        ),
        (lambda case: {"rotary": (*case.rotary, case.rotary[0])}, r"rotary must be \(cos, sin\), got 3 arrays"),
        (lambda case: {"lengths": case.lengths.astype(jnp.uint32)}, "lengths must be int32, got uint32"),
        (
            lambda case: {"head": case.head._replace(bias=case.head.bias[1:])},
            r"bias of head must have shape \(300,\), got \(299,\)",
        ),
        (
            lambda case: {"head": case.head._replace(lm_head=quantize_weight(jnp.ones((300, 128))))},
            "lm_head must be quantised where w_in of layer 0 is, and only there",
        ),
        (
            lambda case: {"head": case.head._replace(bias=jnp.zeros(300))},
            "bias of head must be float16, got float32",
        ),
        (
            lambda case: {"layers": [case.layers[0]._replace(ln_bias=jnp.zeros(DIM)), *case.layers[1:]]},
            "ln_bias of layer 0 must be float16, got float32",
        ),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_what_does_not_fit_is_named(change, message, implementation):
    case = make_case("fp16", quant=False, int8_cache=False)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(case, **change(case)), implementation)


@pytest.mark.parametrize("timeout_s", [-5.0, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_a_timeout_out_of_range_is_named(implementation, timeout_s):
    case = make_case("fp16", quant=False, int8_cache=False)
    with pytest.raises(ValueError, match=f"timeout_s must be 0.001 to 1e6 seconds, got {timeout_s}"):
        run(case, implementation, timeout_s=timeout_s)


@pytest.mark.parametrize("implementation", ["reference", "ffi"])
def test_int8_activations_beside_weights_of_16_bits_are_refused(implementation):
    case = make_case("fp16", int8_activations=True)
    with pytest.raises(ValueError, match="int8_activations needs INT8 weights, got layers of float16"):
        run(case, implementation)


def on_two_shards(case: Case, step: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
    """What ``step(case)`` gives on two devices that each have one of the heads and half of the FFN: x and logits of
    both, [2, ...], and the pages of all heads."""

    def halves(array: Any, axis: int, parts: tuple[int, ...]) -> Any:
        """[2, ...]: of each of the parts behind one another its half; of a scale that all share the whole."""
        if isinstance(array, QuantizedArray):
            return QuantizedArray(halves(array.qvalue, axis, parts), halves(array.scale, axis, parts))
        if array.shape[axis] == 1:
            return jnp.stack([array] * 2)
        pieces = jnp.split(array, np.cumsum(parts)[:-1], axis=axis)
        return jnp.concatenate([jnp.stack(jnp.split(piece, 2, axis=axis)) for piece in pieces], axis=axis + 1)

    attention_dim = HEADS * HEAD_DIM
    layers = [
        DecodeLayer(
            ln_scale=jnp.stack([layer.ln_scale] * 2),
            ln_bias=jnp.stack([layer.ln_bias] * 2),
            w_in=halves(layer.w_in, 0, (*[attention_dim] * 3, FFN)),
            b_ffn_in=halves(layer.b_ffn_in, 0, (FFN,)),
            w_out=halves(layer.w_out, 1, (attention_dim, FFN)),
            k_multiplier=None if layer.k_multiplier is None else halves(layer.k_multiplier, 0, (attention_dim, FFN)),
            b_ffn_out=jnp.stack([layer.b_ffn_out] * 2),
        )
        for layer in case.layers
    ]

    def local(layers: Any, k_pages: Any, v_pages: Any) -> tuple[Any, ...]:
        own = [jax.tree.map(lambda array: array[0], layer) for layer in layers]
        x, logits, k_pages, v_pages = step(dataclasses.replace(case, layers=own, k_pages=k_pages, v_pages=v_pages))
        return x[None], logits[None], k_pages, v_pages

    by_shard, by_head = PartitionSpec("tensor"), PartitionSpec(None, "tensor")
    mapped = jax.shard_map(
        local,
        mesh=make_mesh(1, 1, 2),
        in_specs=(by_shard, by_head, by_head),
        out_specs=(by_shard, by_shard, by_head, by_head),
        check_vma=False,
    )
    return jax.jit(mapped)(layers, case.k_pages, case.v_pages)


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_shards_that_are_summed_are_the_whole(kind):
    """By the reference."""
    case = make_case("fp32", **kind)

    def step(case: Case) -> tuple[Any, ...]:
        options: dict[str, Any] = {"epsilon": EPSILON, "head": case.head, "sum_over": "tensor"}
        return decode_layers(*case.arguments(), **options, implementation="reference")[:4]

    found = on_two_shards(case, step)
    expected = run(case, "reference")
    for a, b in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(a[0], a[1])
        tolerances.assert_close(a[0], b, tolerances.STEP_OF_KERNELS["fp32"])
    if "int8_cache" not in kind:  # where one step of an integer may lie between two sums
        for a, b in zip(jax.tree.leaves(found[2:]), jax.tree.leaves(expected[2:]), strict=True):
            tolerances.assert_close(a, b, tolerances.STEP_OF_KERNELS["fp32"])


@pytest.mark.host
def test_what_the_kernels_do_not_take_is_named(monkeypatch):
    case = make_case("fp16", quant=False, int8_cache=False)
    many = dataclasses.replace(
        case,
        x=jnp.ones((65, DIM)),
        rotary=(jnp.ones((65, 8)), jnp.ones((65, 8))),
        page_table=jnp.zeros((65, 2), jnp.int32),
        lengths=jnp.zeros(65, jnp.int32),
        num_new=jnp.zeros(65, jnp.int32),
    )
    with pytest.raises(ValueError, match=r"x must have 1 to 64 rows .* got shape \(65, 128\)"):
        run(many, "ffi")
    with pytest.raises(ValueError, match="semaphores must be given"):
        decode_layers(*case.arguments(), epsilon=EPSILON, implementation="ffi")
    monkeypatch.setattr(_arguments, "check_attention", lambda *_, **__: None)
    with pytest.raises(Exception, match="kogpt_decode_layers: cos must have shape"):  # the binding's own check
        jax.block_until_ready(run(dataclasses.replace(case, rotary=(jnp.ones((2, 8)), jnp.ones((2, 8)))), "ffi"))
