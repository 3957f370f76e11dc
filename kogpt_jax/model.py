"""GPT-J as Flax NNX modules: what one device computes on its local shards, inside `jax.shard_map`.

Attention and FFN of a GPT-J layer share one LayerNorm and one residual, so a layer is two products: ``w_in`` makes
queries, keys, values and the FFN's hidden units, ``w_out`` takes attention's and the FFN's outputs back, and one
`psum` follows. The phases over whole sequences differ only in how they attend: each hands `Block` a function from local
q, k, v to attention's output, or leaves rotary embedding, cache and attention to `custom_ops.prefill_attention`. A
decode step calls `custom_ops`, whose kernels do a layer in three calls.

The numeric oracle is Hugging Face's ``GPTJForCausalLM`` in f32. Products run in the model's dtype and accumulate in
f32; LayerNorm, softmax, rotary embedding and the residual stream are f32 whatever the dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from custom_ops import (
    MAX_ROWS,
    QuantizedArray,
    decode_attention,
    int8_gemm,
    linear,
    mixed_gemm,
    numerics,
    pages,
    prefill_attention,
    quantize_rows,
)
from custom_ops.rotary import apply_rotary
from kogpt_jax.config import ModelConfig, OpsConfig
from kogpt_jax.kv_cache import KVCache
from kogpt_jax.quantize import SCALE_SUFFIX, quantize_leaf
from kogpt_jax.sharding import named_sharding, partition_spec

DEFAULT_OPS = OpsConfig()

# Longer prompts attend in blocks of this many queries, so that scores take [B, N, block, T] and not [B, N, T, T].
QUERY_BLOCK = 512

# Values of an INT8 matrix that are converted at a time, for a product with whole sequences.
TILE_SIZE = 1 << 24

# From a layer's local q, k, v to attention's output and what the phase keeps of the layer: its updated pages, or
# nothing.
Attend = Callable[[Array, Array, Array], tuple[Array, tuple[Array, ...]]]


class Embed(nnx.Module):
    """Token embedding. GPT-J has no position embedding: rotary does that in attention."""

    def __init__(self, config: ModelConfig):
        self.embedding = _param((config.vocab_size, config.model_dim), ("vocab", "embed"), config)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.embedding[...][tokens].astype(jnp.float32)


class Block(nnx.Module):
    """One layer: LayerNorm -> ``w_in`` -> attention beside GELU -> ``w_out`` -> psum -> residual."""

    def __init__(self, config: ModelConfig, num_shards: int, ops: OpsConfig):
        model_dim, ffn_dim = config.model_dim, config.ffn_dim
        local_dim, local_ffn = model_dim // num_shards, ffn_dim // num_shards
        self.config = config
        self.ops = ops
        self.num_shards = num_shards
        self.num_local_heads = config.num_heads // num_shards
        self.ln_scale = _param((model_dim,), ("embed",), config, mean=1.0)
        self.ln_bias = _param((model_dim,), ("embed",), config)
        # Output-major: the K values of each output lie together, which decode kernels and INT8 tensor cores want.
        self.w_in, self.w_in_scale = _matrix(
            (num_shards, 3 * local_dim + local_ffn, model_dim), ("tensor_shard", "fused", "embed"), config, k_axes=(2,)
        )
        self.b_ffn_in = _param((num_shards, local_ffn), ("tensor_shard", "fused"), config)
        # K is attention's and the FFN's part of every shard: an output has one scale over all of them.
        self.w_out, self.w_out_scale = _matrix(
            (num_shards, model_dim, local_dim + local_ffn), ("tensor_shard", "embed", "fused"), config, k_axes=(0, 2)
        )
        self.w_out_multiplier = _multiplier((num_shards, local_dim + local_ffn), ("tensor_shard", "fused"), config)
        self.b_ffn_out = _param((model_dim,), ("embed",), config)

    def __call__(self, x: Float[Array, "B T D"], attend: Attend) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        batch, q_len, _ = x.shape
        qkv, act = self._project_in(x)
        with jax.named_scope("attention"):
            heads = (batch, q_len, self.num_local_heads, self.config.head_dim)
            attn, kept = attend(*(part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1)))
            attn = attn.reshape(batch, q_len, -1)
            # Not an update: XLA finds the concatenation that made `act` and leaves one of the two.
            act = jnp.concatenate([attn, act[..., attn.shape[-1] :]], axis=-1)
        return self._project_out(x, act), kept

    def prefill(
        self,
        x: Float[Array, "B T D"],
        rotary: tuple[Array, Array],
        layer: int,
        cache: KVCache,
        lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Whole prompts, with `custom_ops.prefill_attention` between the products.

        Args:
            rotary: (cos, sin) of each token, [B T, R].
            cache: the tokens before; its lengths are the first positions.
            lengths: tokens of each row; what stands behind them may become anything, NaN too.

        Returns:
            The residual stream, the layer's pages with the tokens.
        """
        batch, q_len, _ = x.shape
        qkv, act = self._project_in(x)
        with jax.named_scope("attention"):
            out, k_pages, v_pages, _ = prefill_attention(
                qkv.reshape(batch * q_len, -1),
                rotary,
                cache.k[layer],
                cache.v[layer],
                cache.page_table,
                jnp.arange(batch, dtype=jnp.int32) * q_len,
                lengths,
                cache.lengths,
                act.reshape(batch * q_len, -1),
                max_new=q_len,
                implementation=self.ops.prefill_attention,
            )
        return self._project_out(x, out.reshape(act.shape)), (k_pages, v_pages)

    def _project_in(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T qkv"], Float[Array, "B T K"]]:
        """Queries, keys and values one after another, and ``w_out``'s input with the FFN's part of it there."""
        config = self.config
        local_dim = self.num_local_heads * config.head_dim
        with jax.named_scope("w_in"):
            qkv, act = prefill_linear(
                x,
                _local_weight(self.w_in, self.w_in_scale),
                config,
                self.ops,
                layer_norm=(self.ln_scale[...], self.ln_bias[...], config.layer_norm_epsilon),
                bias=self.b_ffn_in[0],
                gelu_from=3 * local_dim,
                act_dim=local_dim + self.b_ffn_in.shape[1],
            )
        assert act is not None  # with gelu_from
        return qkv, act

    def _project_out(self, x: Float[Array, "B T D"], act: Float[Array, "B T K"]) -> Float[Array, "B T D"]:
        with jax.named_scope("w_out"):
            w_out, bias = _local_weight(self.w_out, self.w_out_scale), self.b_ffn_out[...]
            multiplier = _local_multiplier(self.w_out_multiplier)
            if self.num_shards == 1:
                options: dict[str, Any] = {"bias": bias, "residual": x}
                return prefill_linear(act, w_out, self.config, self.ops, k_multiplier=multiplier, **options)[0]
            out, _ = prefill_linear(act, w_out, self.config, self.ops, k_multiplier=multiplier, out_dtype=jnp.float32)
            return x + jax.lax.psum(out, "tensor") + bias.astype(jnp.float32)

    def decode_step(
        self,
        x: Float[Array, "B D"],
        rotary: tuple[Array, Array],
        layer: int,
        cache: KVCache,
        num_new: Int[Array, " B"],
        semaphores: Array,
    ) -> tuple[Float[Array, "B D"], tuple[Array, Array], Array]:
        """One token a row. Both products' inputs lie in one buffer ``act``: GELU fills the FFN's part of it, attention
        its own.

        Returns:
            The residual stream, the layer's pages with the new tokens, the semaphores.
        """
        config, ops = self.config, self.ops
        local_dim = self.num_local_heads * config.head_dim
        with jax.named_scope("w_in"):
            qkv, act, semaphores = decode_linear(
                x,
                _local_weight(self.w_in, self.w_in_scale),
                ops,
                semaphores,
                layer_norm=(self.ln_scale[...], self.ln_bias[...], config.layer_norm_epsilon),
                bias=self.b_ffn_in[0],
                gelu_from=3 * local_dim,
                act_dim=local_dim + self.b_ffn_in.shape[1],
            )
        with jax.named_scope("attention"):
            act, k_pages, v_pages, semaphores = decode_attention(
                qkv,
                rotary,
                cache.k[layer],
                cache.v[layer],
                cache.page_table,
                cache.lengths,
                num_new,
                act,
                semaphores=semaphores,
                prefetch_cache=True,  # the kernels just ahead are a product's: no page is theirs
                implementation=ops.decode_attention,
            )
        with jax.named_scope("w_out"):
            w_out = _local_weight(self.w_out, self.w_out_scale)
            options: dict[str, Any] = {"k_multiplier": _local_multiplier(self.w_out_multiplier)}
            if self.num_shards == 1:
                options |= {"bias": self.b_ffn_out[...], "residual": x}
                x, semaphores = decode_linear(act, w_out, ops, semaphores, **options)
            else:
                out, semaphores = decode_linear(act, w_out, ops, semaphores, out_dtype=jnp.float32, **options)
                x = x + jax.lax.psum(out, "tensor") + self.b_ffn_out[...].astype(jnp.float32)
        return x, (k_pages, v_pages), semaphores


class GPTJ(nnx.Module):
    """The whole model. Built only abstractly (`model_def`); its leaves are held apart and merged inside the jit."""

    def __init__(self, config: ModelConfig, num_shards: int, ops: OpsConfig):
        self.config = config
        self.ops = ops
        self.embed = Embed(config)
        self.blocks = nnx.List([Block(config, num_shards, ops) for _ in range(config.num_layers)])
        self.ln_f_scale = _param((config.model_dim,), ("embed",), config, mean=1.0)
        self.ln_f_bias = _param((config.model_dim,), ("embed",), config)
        self.lm_head, self.lm_head_scale = _matrix(
            (config.vocab_size, config.model_dim), ("vocab", "embed"), config, k_axes=(1,)
        )
        self.lm_head_bias = _param((config.vocab_size,), ("vocab",), config)

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Final hidden states of every position, causal and without a cache: for scoring and training.

        A row may be padded on the right: a position sees only what stands before it.
        """
        rotary = for_heads(rotary_tables(jnp.arange(tokens.shape[1])[None], self.config))

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
            q, k = apply_rotary(q, k, rotary)
            return causal_attention(q, k, v), ()

        x = self.embed(tokens)
        for block in self.blocks:
            x, _ = block(x, attend)
        return self._final_norm(x)

    def layer_inputs(self, tokens: Int[Array, "B T"]) -> Iterator[tuple[Float[Array, "B T D"], Float[Array, "B T K"]]]:
        """Of each layer what ``w_in`` and ``w_out`` multiply: LayerNorm's output, and attention's beside GELU's."""
        rotary = for_heads(rotary_tables(jnp.arange(tokens.shape[1])[None], self.config))
        x = self.embed(tokens)
        for block in self.blocks:
            qkv, act = block._project_in(x)
            heads = (*tokens.shape, block.num_local_heads, self.config.head_dim)
            q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
            attn = causal_attention(*apply_rotary(q, k, rotary), v).reshape(*tokens.shape, -1)
            act = jnp.concatenate([attn, act[..., attn.shape[-1] :]], axis=-1)
            multiplier = _local_multiplier(block.w_out_multiplier)
            multiplied = act if multiplier is None else act * multiplier
            yield layer_norm(x, block.ln_scale[...], block.ln_bias[...], self.config), multiplied
            x = block._project_out(x, act)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """Reads left-aligned prompts into an empty cache.

        Returns:
            The final hidden state of each row's last token, and the cache with ``lengths`` keys a row.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        is_valid = positions < lengths[:, None]
        rotary = rotary_tables(positions[:1], self.config)
        cos, sin = (jnp.tile(table[0], (tokens.shape[0], 1)) for table in rotary)  # of each token
        x = self.embed(tokens)
        new_pages = []
        for layer, block in enumerate(self.blocks):

            def attend(q: Array, k: Array, v: Array, layer: int = layer) -> tuple[Array, tuple[Array, ...]]:
                q, k = apply_rotary(q, k, for_heads(rotary))
                return causal_attention(q, k, v), _append(cache, layer, k, v, positions, is_valid)

            layer_pages: tuple[Array, ...]
            if self.ops.prefill_attention == "reference":
                x, layer_pages = block(x, attend)
            else:
                x, layer_pages = block.prefill(x, (cos, sin), layer, cache, lengths)
            new_pages.append(layer_pages)
        # Of a row's positions only one meets lm_head.
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._final_norm(last), _with_pages(cache, new_pages, lengths)

    def decode_step(
        self, tokens: Int[Array, " B"], num_new: Int[Array, " B"], cache: KVCache, semaphores: Array
    ) -> tuple[Float[Array, "B V"], KVCache, Array]:
        """Appends one token a row and attends to all of the row.

        Args:
            tokens: the token that follows the cached ones.
            num_new: 1 for a running row; 0 for a finished one, whose cache and length stay as they are.
            cache: the tokens before.
            semaphores: from ``custom_ops.make_semaphores``.

        Returns:
            Logits in f32 (those of a finished row mean nothing), the cache, the semaphores.
        """
        rotary = rotary_tables(cache.lengths, self.config)
        x = self.embed(tokens)
        new_pages = []
        for layer, block in enumerate(self.blocks):
            x, layer_pages, semaphores = block.decode_step(x, rotary, layer, cache, num_new, semaphores)
            new_pages.append(layer_pages)
        with jax.named_scope("lm_head"):
            logits, semaphores = decode_linear(
                x,
                _local_weight(self.lm_head, self.lm_head_scale),
                self.ops,
                semaphores,
                layer_norm=(self.ln_f_scale[...], self.ln_f_bias[...], self.config.layer_norm_epsilon),
                bias=self.lm_head_bias[...],
                out_dtype=jnp.float32,
            )
        return logits, _with_pages(cache, new_pages, cache.lengths + num_new), semaphores

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in f32 from final hidden states."""
        with jax.named_scope("lm_head"):
            weight = _local_weight(self.lm_head, self.lm_head_scale)
            return dense(hidden, weight, jnp.float32) + self.lm_head_bias[...].astype(jnp.float32)

    def _final_norm(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return layer_norm(x, self.ln_f_scale[...], self.ln_f_bias[...], self.config)


def dense(
    x: Float[Array, "*B K"], weight: Float[Array, "M K"] | QuantizedArray, out_dtype: np.dtype | type
) -> Float[Array, "*B M"]:
    """``x @ weight.T``, accumulated in f32, for any number of rows.

    INT8 values are exact in every dtype; their scales multiply the sums, so that nothing but the quantisation is lost.
    """
    if not isinstance(weight, QuantizedArray):
        return numerics.product(x, weight, out_dtype)
    num_outputs, k_dim = weight.shape
    # Tile by tile in a loop: converted as a whole, XLA would hold all layers' weights in the dtype at the same time.
    tile = min(max(1, TILE_SIZE // k_dim), -(-num_outputs // 2))
    if tile > 128:
        tile -= tile % 128  # what tensor cores like

    def add_tile(i: Array, out: Array) -> Array:
        first = jnp.minimum(i * tile, num_outputs - tile)  # the last tile may begin within the one before
        qvalue = jax.lax.dynamic_slice_in_dim(weight.qvalue, first, tile)
        scale = jax.lax.dynamic_slice_in_dim(weight.scale, first, tile)[:, 0]
        sums = numerics.product(x, qvalue.astype(x.dtype), jnp.float32) * scale
        return jax.lax.dynamic_update_slice_in_dim(out, sums.astype(out_dtype), first, axis=-1)

    # All of it is overwritten. Made of x, or XLA would make that of all layers at the start.
    out = jnp.broadcast_to((x[..., :1] * 0).astype(out_dtype), (*x.shape[:-1], num_outputs))
    return jax.lax.fori_loop(0, -(-num_outputs // tile), add_tile, out)


def decode_linear(
    x: Float[Array, "B K"],
    weight: Float[Array, "M K"] | QuantizedArray,
    ops: OpsConfig,
    semaphores: Array,
    *,
    residual: Float[Array, "B M"] | None = None,
    **arguments: Any,
) -> tuple[Array, ...]:
    """`custom_ops.linear` as ``ops`` says for this many rows; more than a kernel takes run in groups."""
    rows = x.shape[0]
    implementation = ops.linear if rows <= MAX_ROWS else ops.linear_many_rows
    group_len = rows if implementation == "reference" else MAX_ROWS
    groups = []
    for first in range(0, rows, group_len):
        group = slice(first, first + group_len)
        *outputs, semaphores = linear(
            x[group],
            weight,
            residual=None if residual is None else residual[group],
            semaphores=semaphores,
            prefetch_weight=True,  # the weights are arguments of the jitted phases: no kernel writes them
            implementation=implementation,
            **arguments,
        )
        groups.append(outputs)
    if len(groups) == 1:
        return *groups[0], semaphores
    return *(jnp.concatenate(outputs) for outputs in zip(*groups, strict=True)), semaphores


def prefill_linear(
    x: Float[Array, "B T K"],
    weight: Float[Array, "M K"] | QuantizedArray,
    config: ModelConfig,
    ops: OpsConfig,
    *,
    layer_norm: tuple[Array, Array, float] | None = None,
    k_multiplier: Array | None = None,
    bias: Array | None = None,
    residual: Float[Array, "B T M"] | None = None,
    gelu_from: int | None = None,
    act_dim: int | None = None,
    out_dtype: np.dtype | type | None = None,
) -> tuple[Array, Array | None]:
    """A layer's product for whole sequences, with what `custom_ops.linear` has around it: (y, act).

    ``quant="w8a8"`` rounds the activations to INT8, a scale a token. Of ``act``, [B, T, act_dim], the columns in front
    of GELU's are attention's to fill.
    """
    batch, q_len, k_dim = x.shape
    x = x.reshape(batch * q_len, k_dim)
    if residual is not None:
        residual = residual.reshape(batch * q_len, -1)
    options: dict[str, Any] = {
        "bias": bias,
        "residual": residual,
        "gelu_from": gelu_from,
        "act_dim": act_dim,
        "out_dtype": out_dtype,
    }
    y: Array
    act: Array | None
    if config.quant == "w8a8":
        assert isinstance(weight, QuantizedArray)
        in_front: dict[str, Any] = {"layer_norm": layer_norm, "k_multiplier": k_multiplier}
        quantized = quantize_rows(x, implementation=ops.gemm, **in_front)
        y, act = int8_gemm(quantized, weight, dtype=config.jax_dtype, implementation=ops.gemm, **options)
    else:
        if layer_norm is not None:
            x = numerics.layer_norm(x, *layer_norm).astype(config.jax_dtype)
        if k_multiplier is not None:
            x = (x.astype(jnp.float32) * k_multiplier).astype(config.jax_dtype)
        if isinstance(weight, QuantizedArray) and ops.gemm == "ffi":
            y, act = mixed_gemm(x, weight, implementation="ffi", **options)
        else:
            y, act = _dense_with(x, weight, config, **options)
    return y.reshape(batch, q_len, -1), None if act is None else act.reshape(batch, q_len, -1)


def _dense_with(
    x: Float[Array, "T K"],
    weight: Float[Array, "M K"] | QuantizedArray,
    config: ModelConfig,
    *,
    bias: Array | None,
    residual: Array | None,
    gelu_from: int | None,
    act_dim: int | None,
    out_dtype: np.dtype | type | None,
) -> tuple[Array, Array | None]:
    """`dense`, and behind it what `prefill_linear` adds."""
    if gelu_from is None:
        y = dense(x, weight, jnp.float32 if residual is not None else out_dtype or config.jax_dtype)
        if residual is not None:
            y = residual + y
        return y if bias is None else y + bias.astype(jnp.float32), None
    y, ffn = jnp.split(dense(x, weight, config.jax_dtype), (gelu_from,), axis=-1)
    ffn = ffn.astype(jnp.float32)
    if bias is not None:
        ffn = ffn + bias.astype(jnp.float32)
    ffn = jax.nn.gelu(ffn, approximate=True).astype(config.jax_dtype)
    num_columns = 0 if act_dim is None else act_dim - ffn.shape[1]
    return y, jnp.concatenate([jnp.zeros((x.shape[0], num_columns), ffn.dtype), ffn], axis=1)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], config: ModelConfig
) -> Float[Array, "*B D"]:
    """LayerNorm (Ba et al. 2016) in f32, returned in the model's dtype."""
    return numerics.layer_norm(x, scale, bias, config.layer_norm_epsilon).astype(config.jax_dtype)


def rotary_tables(
    positions: Int[Array, "*B"], config: ModelConfig
) -> tuple[Float[Array, "*B R"], Float[Array, "*B R"]]:
    """Cosines and sines of the rotary embedding (Su et al. 2021), R = rotary_dim / 2."""
    exponents = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
    frequencies = jnp.asarray(10000.0**-exponents, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def for_heads(rotary: tuple[Array, Array]) -> tuple[Array, Array]:
    """The same angles for all heads of [B, T, N, H]."""
    cos, sin = rotary
    return cos[:, :, None], sin[:, :, None]


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T N H"], v: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Each query attends to its own and earlier positions; scores and softmax in f32."""
    q_len = q.shape[1]
    outputs = []
    for start in range(0, q_len, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q_len)  # later keys are masked for the whole block: leave them out
        scores = numerics.einsum("btnh,bsnh->bnts", q[:, start:stop], k[:, :stop]) / math.sqrt(q.shape[-1])
        is_visible = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
        probs = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)
        outputs.append(numerics.einsum("bnts,bsnh->btnh", probs.astype(v.dtype), v[:, :stop]).astype(q.dtype))
    return jnp.concatenate(outputs, axis=1)


def _append(cache: KVCache, layer: int, k: Array, v: Array, positions: Array, is_valid: Array) -> tuple[Array, Array]:
    """A layer's pages of keys and of values with the new tokens in."""
    k_pages = pages.append(cache.k[layer], k, cache.page_table, positions, is_valid)
    return k_pages, pages.append(cache.v[layer], v, cache.page_table, positions, is_valid)


def _with_pages(cache: KVCache, new_pages: Sequence[tuple[Array, ...]], lengths: Array) -> KVCache:
    k, v = zip(*new_pages, strict=True)
    return dataclasses.replace(cache, k=k, v=v, lengths=lengths)


def _param(
    shape: tuple[int, ...], logical_axes: tuple[str, ...], config: ModelConfig, *, mean: float = 0.0
) -> nnx.Param:
    """A parameter's one declaration; `model_def` reads it back as a `ParamSpec`."""
    return nnx.Param(jnp.zeros(shape, config.jax_dtype), logical_axes=logical_axes, init_mean=mean)


def _matrix(
    shape: tuple[int, ...], logical_axes: tuple[str, ...], config: ModelConfig, *, k_axes: tuple[int, ...]
) -> tuple[nnx.Param, nnx.Param | None]:
    """A weight matrix and, where it is quantised, its scales: the same rank with 1 along K."""
    if config.quant == "none":
        return _param(shape, logical_axes, config), None
    scale_shape = tuple(1 if axis in k_axes else extent for axis, extent in enumerate(shape))
    scale_axes = tuple(None if axis in k_axes else name for axis, name in enumerate(logical_axes))
    return (
        nnx.Param(jnp.zeros(shape, jnp.int8), logical_axes=logical_axes, init_mean=0.0),
        nnx.Param(jnp.zeros(scale_shape, jnp.float32), logical_axes=scale_axes, init_mean=0.0),
    )


def _multiplier(shape: tuple[int, ...], logical_axes: tuple[str, ...], config: ModelConfig) -> nnx.Param | None:
    """What the inputs of a matrix are multiplied with, where the model has such: f32, since kernels take no other."""
    if not config.has_multiplier:
        return None
    return nnx.Param(jnp.ones(shape, jnp.float32), logical_axes=logical_axes, init_mean=1.0)


def _local_multiplier(multiplier: nnx.Param | None) -> Array | None:
    """A multiplier without the shard axis."""
    return None if multiplier is None else multiplier[0]


def _local_weight(weight: nnx.Param, scale: nnx.Param | None) -> Array | QuantizedArray:
    """A matrix as a device multiplies by it: its own shard, without the shard axis."""
    values = weight[...].reshape(weight.shape[-2:])
    return values if scale is None else QuantizedArray(values, scale[...].reshape(scale.shape[-2:]))


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a parameter is: its path in the module, global shape, dtype, logical axes and the mean it is drawn
    around."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    logical_axes: tuple[str | None, ...]
    init_mean: float


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDef:
    """The model without its leaves: split once, hashable, and a static argument of the jitted phases."""

    config: ModelConfig
    num_shards: int
    params: tuple[ParamSpec, ...]  # in the order of the leaves
    _graphdef: nnx.GraphDef[GPTJ]
    _treedef: jax.tree_util.PyTreeDef

    def merge(self, leaves: Sequence[Array]) -> GPTJ:
        """The module over these leaves (global outside, local inside `jax.shard_map`), in the order of ``params``."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def leaf_specs(self) -> list[jax.sharding.PartitionSpec]:
        """The partition of each leaf."""
        return [partition_spec(param.logical_axes) for param in self.params]


@functools.cache
def model_def(config: ModelConfig, num_shards: int = 1, ops: OpsConfig = DEFAULT_OPS) -> ModelDef:
    """The definition of the model for ``num_shards`` tensor shards; one object per argument, so that jit's cache
    holds. The parameters do not depend on ``ops``."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GPTJ(config, num_shards, ops)))
    leaves, treedef = jax.tree.flatten(state)
    variables = nnx.to_flat_state(state)
    params = []
    for leaf, (path, variable) in zip(leaves, variables, strict=True):
        metadata = variable.get_metadata()
        name = ".".join(str(part) for part in path).removeprefix("embed.")
        params.append(ParamSpec(name, leaf.shape, leaf.dtype, metadata["logical_axes"], metadata["init_mean"]))
    return ModelDef(config, num_shards, tuple(params), graphdef, treedef)


def random_leaves(config: ModelConfig, mesh: Mesh, *, seed: int = 0, std: float = 0.02) -> list[jax.Array]:
    """Random leaves made on the devices: normal with ``std`` (GPT-J's ``initializer_range``) around 1 for LayerNorm's
    scales and 0 for the rest, so that no bias is zero in a test. Quantised ones are made of those of the same seed."""
    key = jax.random.key(seed)
    num_shards = mesh.shape["tensor"]
    specs = {spec.path: spec for spec in model_def(config, num_shards).params}
    leaves: dict[str, Array] = {}
    for index, param in enumerate(model_def(dataclasses.replace(config, quant="none"), num_shards).params):
        sharding = named_sharding(mesh, param.logical_axes)
        leaf = _normal(param.shape, param.dtype, param.init_mean, std, sharding)(jax.random.fold_in(key, index))
        leaves |= quantized_as(specs, param.path, leaf, mesh)
    return [leaves[path] for path in specs]


def quantized_as(specs: Mapping[str, ParamSpec], path: str, leaf: Array, mesh: Mesh) -> dict[str, Array]:
    """An unquantised leaf as a model with these parameters holds it: by path, quantised where that is so there."""
    scale = specs.get(path + SCALE_SUFFIX)
    if scale is None:
        return {path: leaf}
    shardings = (named_sharding(mesh, spec.logical_axes) for spec in (specs[path], scale))
    qvalue, scales = quantize_leaf(leaf, scale.shape, *shardings)
    return {path: qvalue, scale.path: scales}


@functools.cache
def _normal(
    shape: tuple[int, ...], dtype: np.dtype, mean: float, std: float, sharding: jax.sharding.NamedSharding
) -> Callable[[Array], Array]:
    def draw(key: Array) -> Array:
        return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
