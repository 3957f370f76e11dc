"""The layers of a decode step in one call: `linear`, `decode_attention` and `all_reduce` one after another.

What an op by itself costs the host, a few microseconds, is more than the GPU needs for a small one, and a step of a
large model has hundreds of kernels. The CUDA handler keeps all of a step's kernels as one CUDA graph and launches that:
kernels still begin before those ahead have ended (programmatic dependent launch), which XLA's own graphs, made op by
op, do not have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from custom_ops import _arguments, _library, _outputs
from custom_ops.all_reduce import AxisNames, DeviceGroups, all_reduce_reference, find_problem, timeout_ms
from custom_ops.decode_attention import KEYS_PER_SPLIT, decode_attention_reference, shape_problem, values_and_scales
from custom_ops.linear import MAX_ROWS, LayerNorm, k_problem, linear_partials_size, linear_reference
from custom_ops.pages import Pages
from custom_ops.quantization import QuantizedArray
from custom_ops.semaphores import check_semaphores

# As csrc/decode_layers_ffi.h has them: in front of the layers', and of each layer.
_FIXED_ARGUMENTS = 7
_FIXED_RESULTS = 10
_LAYER_ARGUMENTS = 13


class DecodeLayer(NamedTuple):
    """A layer's parameters, with N heads of H values, on a tensor shard those of its heads and FFN units. All but
    ``k_multiplier`` in one dtype; the matrices of all layers may be INT8."""

    ln_scale: Float[Array, " D"]
    ln_bias: Float[Array, " D"]
    w_in: Float[Array, "in_dim D"] | QuantizedArray  # in_dim = 3 N H + F
    b_ffn_in: Float[Array, " F"]
    w_out: Float[Array, "D K"] | QuantizedArray  # K = N H + F
    k_multiplier: Float32[Array, " K"] | None
    b_ffn_out: Float[Array, " D"]


class DecodeHead(NamedTuple):
    """What makes logits of the residual stream."""

    ln_scale: Float[Array, " D"]
    ln_bias: Float[Array, " D"]
    lm_head: Float[Array, "V D"] | QuantizedArray
    bias: Float[Array, " V"]


def decode_layers(
    x: Float32[Array, "B D"],
    layers: Sequence[DecodeLayer],
    rotary: tuple[Float32[Array, "B R"], Float32[Array, "B R"]],
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    *,
    epsilon: float,
    head: DecodeHead | None = None,
    sum_over: AxisNames | None = None,
    device_groups: DeviceGroups = (),
    semaphores: Int32[Array, " NUM_SEMAPHORES"] | None = None,
    prefetch_weights: bool = False,
    int8_activations: bool = False,
    timeout_s: float = 60.0,
    implementation: str,
) -> tuple[Float32[Array, "B D"], Float32[Array, "B V"] | None, list[Pages], list[Pages], Array]:
    """One token a row through layers whose attention and FFN share a LayerNorm and a residual (GPT-J's).

        qkv, ffn = LayerNorm(x) w_in^T, GELU(ffn + b_ffn_in)    attention of qkv over the pages, which get the token
        x        = x + [attention, ffn] w_out^T + b_ffn_out     with ``sum_over``: the product summed over devices

    and behind the last one ``LayerNorm(x) lm_head^T + bias``, if there is a head. What each op means is told by
    `linear`, `decode_attention` and `all_reduce`; "ffi" gives the bits that they give one by one.

    Args:
        x: the residual stream.
        layers: their parameters.
        rotary: (cos, sin) of the angles at the new token's position.
        k_pages: of each layer, all of one shape and dtype, updated in place if they are donated.
        v_pages: likewise.
        page_table: as for `decode_attention`, and so are ``lengths`` and ``num_new``.
        epsilon: of all LayerNorms.
        head: None: no logits.
        sum_over: axes of the mesh over which ``w_out``'s products are summed; ``device_groups`` and ``timeout_s`` as
            for `all_reduce`.
        semaphores: from `make_semaphores` or the op before; "reference" passes them through and takes None.
        prefetch_weights: promises for the parameters of all layers and of the head what `linear`'s ``prefetch_weight``
            does, and for pages and page table what `decode_attention`'s ``prefetch_cache`` does.
        int8_activations: permits for the layers' products, not for the head's, what `linear`'s does: rounding to 8 bits
            by the CUDA kernels for sm_90a. With INT8 weights only.
        implementation: "reference" (any sizes), or "ffi": what "ffi" of the ops takes, 1 to 64 rows; sums on CUDA only.

    Returns:
        (x behind the layers, logits or None, pages of keys, pages of values, semaphores).

    Raises:
        ValueError: an argument does not fit the others, or the implementation does not support it.
    """
    _arguments.check_implementation(implementation)
    _arguments.check_rank("x", x, 2)
    _arguments.check_dtype("x", x, [jnp.float32])
    timeout_ms(timeout_s)
    check_layers(layers, head, x.shape, rotary, k_pages, v_pages, page_table, lengths=lengths, num_new=num_new)
    check_int8_activations(layers, int8_activations)
    arguments = (x, layers, rotary, k_pages, v_pages, page_table, lengths, num_new)
    options: dict[str, Any] = {"epsilon": epsilon, "head": head, "sum_over": sum_over, "semaphores": semaphores}
    if implementation == "reference":
        return decode_layers_reference(*arguments, **options)
    options |= {"device_groups": device_groups, "prefetch_weights": prefetch_weights, "timeout_s": timeout_s}
    return decode_layers_ffi(*arguments, **options, int8_activations=int8_activations)


def decode_layers_reference(
    x: Float32[Array, "B D"],
    layers: Sequence[DecodeLayer],
    rotary: tuple[Array, Array],
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    *,
    epsilon: float,
    head: DecodeHead | None = None,
    sum_over: AxisNames | None = None,
    semaphores: Array | None = None,
) -> tuple[Array, Array | None, list[Pages], list[Pages], Array]:
    """`decode_layers` of the ops' references."""
    new_k, new_v = [], []
    for layer, k, v in zip(layers, k_pages, v_pages, strict=True):
        _, num_heads, _, head_dim = k.shape
        attention_dim = num_heads * head_dim
        qkv, act, _ = linear_reference(
            x,
            layer.w_in,
            layer_norm=LayerNorm(layer.ln_scale, layer.ln_bias, epsilon),
            bias=layer.b_ffn_in,
            gelu_from=3 * attention_dim,
            act_dim=attention_dim + layer.b_ffn_in.shape[0],
        )
        act, k, v, _ = decode_attention_reference(qkv, rotary, k, v, page_table, lengths, num_new, act)
        out, _ = linear_reference(act, layer.w_out, k_multiplier=layer.k_multiplier, out_dtype=jnp.float32)
        if sum_over is None:
            x = x + out + layer.b_ffn_out.astype(jnp.float32)
        else:
            x = all_reduce_reference(out, sum_over, bias=layer.b_ffn_out, residual=x)
        new_k.append(k)
        new_v.append(v)
    logits = None
    if head is not None:
        layer_norm = LayerNorm(head.ln_scale, head.ln_bias, epsilon)
        logits, _ = linear_reference(x, head.lm_head, layer_norm=layer_norm, bias=head.bias, out_dtype=jnp.float32)
    return x, logits, new_k, new_v, semaphores  # type: ignore[return-value]


def decode_layers_ffi(
    x: Float32[Array, "B D"],
    layers: Sequence[DecodeLayer],
    rotary: tuple[Array, Array],
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, " B"],
    num_new: Int32[Array, " B"],
    *,
    epsilon: float,
    head: DecodeHead | None = None,
    sum_over: AxisNames | None = None,
    device_groups: DeviceGroups = (),
    semaphores: Array | None = None,
    prefetch_weights: bool = False,
    int8_activations: bool = False,
    timeout_s: float = 60.0,
) -> tuple[Array, Array | None, list[Pages], list[Pages], Array]:
    """`decode_layers` through XLA's FFI (csrc/decode_layers.h): the Host handler on a CPU, the CUDA handler on an
    NVIDIA GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    _library.register_targets()
    rows, num_ranks = x.shape[0], 1 if sum_over is None else jax.lax.axis_size(sum_over)
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f'x must have 1 to {MAX_ROWS} rows with implementation "ffi", got shape {x.shape}')
    if problem := layers_problem(layers[0], k_pages[0], x.shape, num_ranks, sum_over, device_groups):
        raise ValueError(f'decode_layers with implementation "ffi": {problem}')
    own = [x, *rotary, lengths, num_new]
    buffers = layer_buffers(
        layers, head, k_pages, v_pages, page_table, check_semaphores(semaphores), x.shape, num_ranks
    )
    aliases = {len(own) + argument: result for argument, result in buffers.aliases.items()}
    call = jax.ffi.ffi_call("kogpt_decode_layers", buffers.results, input_output_aliases=aliases)
    results = call(
        *own,
        *buffers.operands,
        **layer_attributes(epsilon, prefetch_weights, int8_activations, device_groups, num_ranks, timeout_s),
    )
    return unpack_layers(results, k_pages, has_head=head is not None)


class LayerBuffers(NamedTuple):
    """What a call of "ffi" takes and gives for its layers and head, behind buffers of the op's own."""

    operands: list[Array]
    results: list[jax.ShapeDtypeStruct]
    aliases: dict[int, int]  # which of the operands become which of the results


def layer_buffers(
    layers: Sequence[DecodeLayer],
    head: DecodeHead | None,
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Int32[Array, "B max_pages"],
    semaphores: Array,
    shape: tuple[int, ...],
    num_ranks: int,
) -> LayerBuffers:
    """In the order of csrc/decode_layers_ffi.h; ``shape`` is the residual stream's."""
    rows, model_dim = shape
    dtype = layers[0].ln_scale.dtype
    _, num_heads, page_len, head_dim = k_pages[0].shape
    attention_dim, act_dim = num_heads * head_dim, layers[0].w_out.shape[1]
    num_splits = -(-page_table.shape[1] * page_len // KEYS_PER_SPLIT)
    operands = [page_table, semaphores]
    if head is None:
        operands += [_outputs.or_empty(None, kind) for kind in (dtype, jnp.float32, dtype, dtype, dtype)]
    else:
        operands += [*_value_and_scale(head.lm_head), head.bias, head.ln_scale, head.ln_bias]
    assert len(operands) == _FIXED_ARGUMENTS
    results = [
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((0,) if head is None else (rows, head.lm_head.shape[0]), jnp.float32),
        jax.ShapeDtypeStruct(semaphores.shape, semaphores.dtype),
        # Scratch.
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((rows, 3 * attention_dim), dtype),
        jax.ShapeDtypeStruct((rows, act_dim), dtype),
        jax.ShapeDtypeStruct((rows, max(model_dim, act_dim)), dtype),
        jax.ShapeDtypeStruct((rows if num_ranks > 1 else 0, model_dim), jnp.float32),
        jax.ShapeDtypeStruct((linear_partials_size(rows),), jnp.float32),
        jax.ShapeDtypeStruct((rows * num_heads * num_splits * (head_dim + 2),), jnp.float32),
    ]
    assert len(results) == _FIXED_RESULTS
    aliases = {1: 2}
    for layer, k, v in zip(layers, k_pages, v_pages, strict=True):
        operands += [
            *(layer.ln_scale, layer.ln_bias, *_value_and_scale(layer.w_in), layer.b_ffn_in),
            *(*_value_and_scale(layer.w_out), _outputs.or_empty(layer.k_multiplier, jnp.float32), layer.b_ffn_out),
        ]
        for part in (*values_and_scales(k), *values_and_scales(v)):
            if part.size:
                aliases[len(operands)] = len(results)
            operands.append(part)
            results.append(jax.ShapeDtypeStruct(part.shape, part.dtype))
    assert len(operands) == _FIXED_ARGUMENTS + _LAYER_ARGUMENTS * len(layers)
    return LayerBuffers(operands, results, aliases)


def layer_attributes(
    epsilon: float,
    prefetch_weights: bool,
    int8_activations: bool,
    device_groups: DeviceGroups,
    num_ranks: int,
    timeout_s: float,
) -> dict[str, Any]:
    """The attributes of a call that go with `layer_buffers`."""
    return {
        "epsilon": np.float32(epsilon),
        "prefetch_weights": bool(prefetch_weights),
        "int8_activations": bool(int8_activations),
        "devices": np.array(device_groups if num_ranks > 1 else (), np.int64).reshape(-1),
        "group_size": np.int64(num_ranks),
        "timeout_ms": timeout_ms(timeout_s),
    }


def unpack_layers(
    results: Sequence[Array], k_pages: Sequence[Pages], *, has_head: bool
) -> tuple[Array, Array | None, list[Pages], list[Pages], Array]:
    """What `decode_layers` returns, of the results that `layer_buffers` describes."""
    y, logits, semaphores = results[:3]
    new_pages = iter(results[_FIXED_RESULTS:])
    pairs = zip(new_pages, new_pages, strict=True)
    is_int8 = isinstance(k_pages[0], QuantizedArray)
    pages = [QuantizedArray(values, scales) if is_int8 else values for values, scales in pairs]
    return y, logits if has_head else None, pages[::2], pages[1::2], semaphores


def check_layers(
    layers: Sequence[DecodeLayer],
    head: DecodeHead | None,
    shape: tuple[int, ...],
    rotary: Sequence[_arguments.Shaped],
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Array,
    **per_row: Array,
) -> None:
    """What every implementation asks of layers, head and cache, for a residual stream of this shape and with one
    number a row in each of ``per_row``."""
    if not layers or len(k_pages) != len(layers) or len(v_pages) != len(layers):
        raise ValueError(
            f"there must be pages of keys and of values for each layer, at least one: got {len(layers)} layers, "
            f"{len(k_pages)} and {len(v_pages)} pages"
        )
    rows, model_dim = shape
    dtype, act_dim = layers[0].ln_scale.dtype, layers[0].w_out.shape[-1]
    _arguments.check_rank("page_table", page_table, 2)
    _arguments.check_shape("page_table", page_table, (rows, page_table.shape[1]))
    _arguments.check_rank("k_pages of layer 0", k_pages[0], 4)
    attention_dim = k_pages[0].shape[1] * k_pages[0].shape[3]
    _arguments.check_attention(
        jax.ShapeDtypeStruct((rows, 3 * attention_dim), dtype),
        rotary,
        k_pages[0],
        v_pages[0],
        page_table,
        jax.ShapeDtypeStruct((rows, max(act_dim, attention_dim)), dtype),
        rows,
        None,
        **per_row,
    )
    for index, (layer, k, v) in enumerate(zip(layers, k_pages, v_pages, strict=True)):
        for name, pages in (("k_pages", k), ("v_pages", v)):
            _arguments.check_shape(f"{name} of layer {index}", pages, k_pages[0].shape)
            if isinstance(pages, QuantizedArray) != isinstance(k_pages[0], QuantizedArray):
                raise ValueError(f"{name} of layer {index} must be INT8 where k_pages of layer 0 are, and only there")
        _check_layer(index, layer, layers[0], model_dim, attention_dim)
    if head is not None:
        _check_head(head, layers[0], model_dim)


def check_int8_activations(layers: Sequence[DecodeLayer], int8_activations: bool) -> None:
    if int8_activations and not isinstance(layers[0].w_in, QuantizedArray):
        raise ValueError(f"int8_activations needs INT8 weights, got layers of {layers[0].w_in.dtype.name}")


def layers_problem(
    first: DecodeLayer,
    pages: Pages,
    shape: tuple[int, ...],
    num_ranks: int,
    sum_over: AxisNames | None,
    device_groups: DeviceGroups,
) -> str | None:
    """Why "ffi" cannot run layers like the first one for a residual stream of this shape, or None if it can."""
    page_len, head_dim = pages.shape[2:]
    is_int8 = isinstance(first.w_in, QuantizedArray)
    weight_dtype = np.dtype(jnp.int8) if is_int8 else first.ln_scale.dtype
    problems = [
        shape_problem(head_dim, page_len),
        *(k_problem(k_dim, weight_dtype) for k_dim in (shape[1], first.w_out.shape[1])),
    ]
    if sum_over is not None and num_ranks > 1:
        problems.append(find_problem(shape, num_ranks, sum_over, device_groups))
    return next(filter(None, problems), None)


def _value_and_scale(weight: Array | QuantizedArray) -> tuple[Array, Array]:
    """The two arrays that a kernel takes for a weight; without scales the second has no elements."""
    if isinstance(weight, QuantizedArray):
        return weight.qvalue, weight.scale[:, 0]
    return weight, _outputs.or_empty(None, jnp.float32)


def _check_layer(index: int, layer: DecodeLayer, first: DecodeLayer, model_dim: int, attention_dim: int) -> None:
    """A layer's shapes, and that its dtypes are those of the first."""
    ffn_dim = first.b_ffn_in.shape[0]
    dtype = first.ln_scale.dtype
    act_dim = attention_dim + ffn_dim
    shapes = {
        "ln_scale": (model_dim,),
        "ln_bias": (model_dim,),
        "w_in": (3 * attention_dim + ffn_dim, model_dim),
        "b_ffn_in": (ffn_dim,),
        "w_out": (model_dim, act_dim),
        "k_multiplier": (act_dim,),
        "b_ffn_out": (model_dim,),
    }
    for name, shape in shapes.items():
        array = getattr(layer, name)
        if array is None:
            continue
        _arguments.check_shape(f"{name} of layer {index}", array, shape)
        if isinstance(array, QuantizedArray) != isinstance(getattr(first, name), QuantizedArray):
            raise ValueError(f"{name} of layer {index} must be quantised where that of layer 0 is, and only there")
        if not isinstance(array, QuantizedArray):
            allowed = jnp.float32 if name == "k_multiplier" else dtype
            _arguments.check_dtype(f"{name} of layer {index}", array, [allowed])


def _check_head(head: DecodeHead, first: DecodeLayer, model_dim: int) -> None:
    """Its shapes, and that its dtypes are those of the first layer."""
    _arguments.check_rank("lm_head", head.lm_head, 2)
    vocab_size = head.lm_head.shape[0]
    shapes = {
        "ln_scale": (model_dim,),
        "ln_bias": (model_dim,),
        "lm_head": (vocab_size, model_dim),
        "bias": (vocab_size,),
    }
    for name, shape in shapes.items():
        array = getattr(head, name)
        _arguments.check_shape(f"{name} of head", array, shape)
        if isinstance(array, QuantizedArray) != (name == "lm_head" and isinstance(first.w_in, QuantizedArray)):
            raise ValueError("lm_head must be quantised where w_in of layer 0 is, and only there")
        if not isinstance(array, QuantizedArray):
            _arguments.check_dtype(f"{name} of head", array, [first.ln_scale.dtype])
