"""Several greedy decode steps in one call: `decode_layers`, and which token follows, one after another.

Behind a step's logits a program of XLA's has a dozen small kernels before the next step can begin: the most likely
token and its probability, what the devices tell one another, the token's embedding, the angles of its position, a few
counters. The CUDA handler has two for all of it, and keeps those of all steps as one CUDA graph, in which the first
product of a step fetches its weights while the token is chosen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from custom_ops import _arguments, _library
from custom_ops.all_reduce import AxisNames, DeviceGroups, timeout_ms
from custom_ops.decode_layers import (
    DecodeHead,
    DecodeLayer,
    check_int8_activations,
    check_layers,
    decode_layers_reference,
    layer_attributes,
    layer_buffers,
    layers_problem,
    unpack_layers,
)
from custom_ops.linear import MAX_ROWS
from custom_ops.pages import Pages
from custom_ops.semaphores import check_semaphores

NO_TOKEN = -1  # stands where a finished row emits nothing

# With implementation "ffi": ids that end a text, and the residual stream's width over several devices.
MAX_EOS_TOKENS = 16
MAX_SUMMED_DIM = 4096

_EOS_TOKENS_END = 2**31  # tokens are int32

_SLICE = 512  # logits that are looked at together: kVocabSlice in csrc/choose_token.h
_CANDIDATE = 4  # values that are kept of a slice


class DecodedSteps(NamedTuple):
    """What `decode_steps` returns: the rows' state behind the last step, what the steps have emitted, the cache."""

    tokens: Int32[Array, " B"]
    lengths: Int32[Array, " B"]
    num_remaining: Int32[Array, " B"]
    new_tokens: Int32[Array, "B num_steps"]
    logprobs: Float32[Array, "B num_steps"]
    k_pages: list[Pages]
    v_pages: list[Pages]
    semaphores: Array


def decode_steps(
    tokens: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    num_remaining: Int32[Array, " B"],
    ignore_eos: Bool[Array, " B"],
    embedding: Float[Array, "local_V D"],
    angles: tuple[Float32[Array, "P R"], Float32[Array, "P R"]],
    layers: Sequence[DecodeLayer],
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Int32[Array, "B max_pages"],
    *,
    num_steps: int,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    epsilon: float,
    head: DecodeHead,
    sum_over: AxisNames | None = None,
    device_groups: DeviceGroups = (),
    semaphores: Int32[Array, " NUM_SEMAPHORES"] | None = None,
    prefetch_weights: bool = False,
    int8_activations: bool = False,
    timeout_s: float = 60.0,
    implementation: str,
) -> DecodedSteps:
    """The ``num_steps`` tokens of each row that follow the given ones, each the most likely. A step:

        x               = embedding[tokens], and the angles of position ``lengths``
        logits          = `decode_layers` of it, one new token in each row with ``num_remaining`` above 0
        lengths        += 1, token = argmax(logits), the first of equal ones; its log-probability is emitted with it
        num_remaining   = num_remaining - 1, or 0 if the token is one of ``eos_token_ids`` and not ``ignore_eos``

        num_remaining=[2, 5], eos_token_ids=(7,)  ->  new_tokens  row 0: 3 4 -1 -1   row 1: 3 8 7 -1

    A row without remaining tokens stays as it is, its cache too, and emits `NO_TOKEN` with 0. NaN counts as the largest
    logit, and gives NaN. With "ffi" a row has the same bits alone and in any batch.

    Args:
        tokens: the last token of each row, not yet in the cache.
        lengths: tokens of each row in the cache.
        num_remaining: tokens that a row may still get.
        ignore_eos: whether ``eos_token_ids`` end the row's text.
        embedding: in the layers' dtype; of D values.
        angles: (cos, sin) of the rotary angles at positions 0 to P - 1, all that the pages of a row have.
        layers: as for `decode_layers`, and so are pages, ``page_table``, ``epsilon``, ``head``, ``device_groups``,
            ``semaphores`` and ``timeout_s``. State, pages and semaphores are updated in place if they are donated.
        num_steps: at least 1.
        vocab_size: tokens that exist, from 1 to what all devices hold; what lies behind in embedding and head is
            padding.
        eos_token_ids: tokens that end a text, in [0, 2^31); at most 16 with "ffi".
        sum_over: as for `decode_layers`, and the vocabulary lies over these axes, too: device r has the tokens from
            ``r * local_V`` on, of embedding and head.
        prefetch_weights: as for `decode_layers`, and so is ``int8_activations``.
        implementation: "reference" (any sizes), or "ffi": what `decode_layers` takes, and over several devices a D of
            at most 4096 that is a multiple of 8; there a device that does not come gives NaN.

    Raises:
        ValueError: an argument does not fit the others or is out of its range, or the implementation does not support
            it.
    """
    _arguments.check_implementation(implementation)
    _arguments.check_rank("tokens", tokens, 1)
    rows = tokens.shape[0]
    _arguments.check_dtype("ignore_eos", ignore_eos, [jnp.bool_])
    _arguments.check_shape("ignore_eos", ignore_eos, (rows,))
    _arguments.check_rank("embedding", embedding, 2)
    if len(angles) != 2:
        raise ValueError(f"angles must be (cos, sin), got {len(angles)} arrays")
    for index, table in enumerate(angles):
        _arguments.check_rank(f"angles[{index}]", table, 2)
        _arguments.check_dtype(f"angles[{index}]", table, [jnp.float32])
        _arguments.check_shape(f"angles[{index}]", table, angles[0].shape)
    if num_steps < 1 or not angles[0].shape[0]:
        raise ValueError(f"there must be at least one step and position, got {num_steps} and {angles[0].shape[0]}")
    timeout_ms(timeout_s)
    of_rows = jax.ShapeDtypeStruct((rows, angles[0].shape[1]), jnp.float32)
    state: dict[str, Array] = {"tokens": tokens, "lengths": lengths, "num_remaining": num_remaining}
    shape = (rows, embedding.shape[1])
    check_layers(layers, head, shape, (of_rows, of_rows), k_pages, v_pages, page_table, **state)
    check_int8_activations(layers, int8_activations)
    _arguments.check_dtype("embedding", embedding, [layers[0].ln_scale.dtype])
    _arguments.check_shape("embedding", embedding, (head.lm_head.shape[0], embedding.shape[1]))
    _check_ranges(
        angles[0].shape[0], page_table.shape[1] * k_pages[0].shape[2], vocab_size, embedding, sum_over, eos_token_ids
    )
    rest = (ignore_eos, embedding, angles, layers, k_pages, v_pages, page_table)
    arguments = (tokens, lengths, num_remaining, *rest)
    options: dict[str, Any] = {
        "num_steps": num_steps,
        "vocab_size": vocab_size,
        "eos_token_ids": tuple(eos_token_ids),
        "epsilon": epsilon,
        "head": head,
        "sum_over": sum_over,
        "semaphores": semaphores,
    }
    if implementation == "reference":
        return decode_steps_reference(*arguments, **options)
    options |= {"device_groups": device_groups, "prefetch_weights": prefetch_weights, "timeout_s": timeout_s}
    return decode_steps_ffi(*arguments, **options, int8_activations=int8_activations)


def decode_steps_reference(
    tokens: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    num_remaining: Int32[Array, " B"],
    ignore_eos: Bool[Array, " B"],
    embedding: Float[Array, "local_V D"],
    angles: tuple[Array, Array],
    layers: Sequence[DecodeLayer],
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Int32[Array, "B max_pages"],
    *,
    num_steps: int,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    epsilon: float,
    head: DecodeHead,
    sum_over: AxisNames | None = None,
    semaphores: Array | None = None,
) -> DecodedSteps:
    """`decode_steps` of `decode_layers`' reference."""
    emitted: list[tuple[Array, Array]] = []
    local_vocab, num_positions = embedding.shape[0], angles[0].shape[0]
    first = 0 if sum_over is None else jax.lax.axis_index(sum_over) * local_vocab
    for _ in range(num_steps):
        is_running = num_remaining > 0
        positions = jnp.clip(lengths, 0, num_positions - 1)
        rotary = (angles[0][positions], angles[1][positions])
        local = tokens - first
        is_own = (local >= 0) & (local < local_vocab)
        x = embedding[jnp.clip(local, 0, local_vocab - 1)].astype(jnp.float32)
        if sum_over is not None:
            x = jax.lax.psum(jnp.where(is_own[:, None], x, 0), sum_over)
        _, logits, k_pages, v_pages, semaphores = decode_layers_reference(
            x,
            layers,
            rotary,
            k_pages,
            v_pages,
            page_table,
            lengths,
            is_running.astype(jnp.int32),
            epsilon=epsilon,
            head=head,
            sum_over=sum_over,
            semaphores=semaphores,
        )
        assert logits is not None  # with a head
        if sum_over is not None:
            logits = jax.lax.all_gather(logits, sum_over, axis=1, tiled=True)
        logits = logits[:, :vocab_size]
        token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        is_one = [token == token_id for token_id in eos_token_ids]
        is_eos = jnp.any(jnp.stack([jnp.zeros_like(is_running), *is_one]), axis=0) & ~ignore_eos
        lengths = lengths + is_running
        num_remaining = jnp.where(is_running & ~is_eos, num_remaining - 1, 0)
        tokens = jnp.where(is_running, token, tokens)
        emitted.append((jnp.where(is_running, token, NO_TOKEN), jnp.where(is_running, logprob, 0.0)))
    new_tokens, logprobs = (jnp.stack(of_steps, axis=1) for of_steps in zip(*emitted, strict=True))
    return DecodedSteps(
        tokens,
        lengths,
        num_remaining,
        new_tokens,
        logprobs,
        list(k_pages),
        list(v_pages),
        semaphores,  # type: ignore[arg-type]
    )


def decode_steps_ffi(
    tokens: Int32[Array, " B"],
    lengths: Int32[Array, " B"],
    num_remaining: Int32[Array, " B"],
    ignore_eos: Bool[Array, " B"],
    embedding: Float[Array, "local_V D"],
    angles: tuple[Array, Array],
    layers: Sequence[DecodeLayer],
    k_pages: Sequence[Pages],
    v_pages: Sequence[Pages],
    page_table: Int32[Array, "B max_pages"],
    *,
    num_steps: int,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    epsilon: float,
    head: DecodeHead,
    sum_over: AxisNames | None = None,
    device_groups: DeviceGroups = (),
    semaphores: Array | None = None,
    prefetch_weights: bool = False,
    int8_activations: bool = False,
    timeout_s: float = 60.0,
) -> DecodedSteps:
    """`decode_steps` through XLA's FFI (csrc/decode_steps.h): the Host handler on a CPU, the CUDA handler on an NVIDIA
    GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    _library.register_targets()
    semaphores = check_semaphores(semaphores)
    rows, shape = tokens.shape[0], (tokens.shape[0], embedding.shape[1])
    num_ranks = _num_ranks(sum_over)
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f'tokens must be those of 1 to {MAX_ROWS} rows with implementation "ffi", got {rows}')
    problem = layers_problem(layers[0], k_pages[0], shape, num_ranks, sum_over, device_groups)
    problem = problem or steps_problem(embedding.shape[1], num_ranks, eos_token_ids)
    if problem:
        raise ValueError(f'decode_steps with implementation "ffi": {problem}')
    own = [tokens, lengths, num_remaining, ignore_eos, embedding, *angles]
    num_slices = -(-embedding.shape[0] // _SLICE)
    own_results = [
        *(jax.ShapeDtypeStruct((rows,), jnp.int32) for _ in range(3)),
        jax.ShapeDtypeStruct((rows, num_steps), jnp.int32),
        jax.ShapeDtypeStruct((rows, num_steps), jnp.float32),
        # Scratch.
        jax.ShapeDtypeStruct(shape, jnp.float32),
        *(jax.ShapeDtypeStruct((rows, table.shape[1]), jnp.float32) for table in angles),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, num_slices, _CANDIDATE), jnp.float32),
    ]
    buffers = layer_buffers(layers, head, k_pages, v_pages, page_table, semaphores, shape, num_ranks)
    aliases = {index: index for index in range(3)}
    aliases |= {len(own) + argument: len(own_results) + result for argument, result in buffers.aliases.items()}
    call = jax.ffi.ffi_call("kogpt_decode_steps", [*own_results, *buffers.results], input_output_aliases=aliases)
    results = call(
        *own,
        *buffers.operands,
        vocab_size=np.int64(vocab_size),
        eos_token_ids=np.array(eos_token_ids, np.int64),
        **layer_attributes(epsilon, prefetch_weights, int8_activations, device_groups, num_ranks, timeout_s),
    )
    tokens, lengths, num_remaining, new_tokens, logprobs = results[:5]
    _, _, new_k, new_v, semaphores = unpack_layers(results[len(own_results) :], k_pages, has_head=True)
    return DecodedSteps(tokens, lengths, num_remaining, new_tokens, logprobs, new_k, new_v, semaphores)


def _check_ranges(
    num_positions: int,
    capacity: int,
    vocab_size: int,
    embedding: Array,
    sum_over: AxisNames | None,
    eos_token_ids: Sequence[int],
) -> None:
    """What every implementation asks of positions, for pages of ``capacity`` tokens a row, and of tokens."""
    if num_positions < capacity:
        raise ValueError(
            f"angles must be those of all {capacity} positions that the pages of a row have, got {num_positions}"
        )
    num_held = embedding.shape[0] * _num_ranks(sum_over)
    if not 1 <= vocab_size <= num_held:
        raise ValueError(
            f"vocab_size must be from 1 to {num_held}, the rows of embedding on all devices, got {vocab_size}"
        )
    for token_id in eos_token_ids:
        if not 0 <= token_id < _EOS_TOKENS_END:
            raise ValueError(f"eos_token_ids must be in [0, 2^31), got {token_id}")


def _num_ranks(sum_over: AxisNames | None) -> int:
    """Devices that the vocabulary lies over."""
    return 1 if sum_over is None else jax.lax.axis_size(sum_over)


def steps_problem(model_dim: int, num_ranks: int, eos_token_ids: Sequence[int]) -> str | None:
    """Why "ffi" cannot choose the tokens behind layers that it runs, or None if it can.

    Args:
        model_dim: the residual stream's width.
        num_ranks: devices that the vocabulary lies over.
        eos_token_ids: tokens that end a text.
    """
    if len(eos_token_ids) > MAX_EOS_TOKENS:
        return f"eos_token_ids must be at most {MAX_EOS_TOKENS}, got {len(eos_token_ids)}"
    if num_ranks > 1 and (model_dim > MAX_SUMMED_DIM or model_dim % 8):
        return f"embedding must have at most {MAX_SUMMED_DIM} columns, a multiple of 8, got {model_dim}"
    return None
