"""GPT-J as Flax NNX modules: what one device computes on its local shards, inside `jax.shard_map`.

Attention and FFN of a GPT-J layer share one LayerNorm and one residual, so a layer is two products: ``w_in`` makes
queries, keys, values and the FFN's hidden units, ``w_out`` takes attention's and the FFN's outputs back, and one
sum over the shards follows. Prompts and texts to be scored are packed, the tokens of all rows one after another, so
that little is computed for padding; only `custom_ops.prefill_attention` looks at rows. A decode step is one call of
`custom_ops.decode_layers` where its kernels run all of it (`GPTJ.decode_step_to_logits`), else three ops a layer; and
several greedy ones are one call of `custom_ops.decode_steps` (`GPTJ.decode_steps`).

Global leaves have a leading axis of pipeline stages (`sharding.Split`) and one of tensor shards; of both a device
holds one, and `_local` drops them.

The numeric oracle is Hugging Face's ``GPTJForCausalLM`` in f32. Products run in the model's dtype and accumulate in
f32; LayerNorm, softmax, rotary embedding and the residual stream are f32 whatever the dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from custom_ops import (
    MAX_EARLY_ROWS_INT8,
    MAX_ROWS,
    DecodedSteps,
    DecodeHead,
    DecodeLayer,
    EarlyColumns,
    QuantizedArray,
    decode_attention,
    decode_layers,
    decode_steps,
    int8_gemm,
    linear,
    make_semaphores,
    mixed_gemm,
    numerics,
    prefill_attention,
    quantize_rows,
)
from custom_ops.pages import Pages
from custom_ops.prefill_attention import token_rows
from kogpt_jax.collectives import device_groups, is_kernel, sum_over
from kogpt_jax.config import ModelConfig, OpsConfig
from kogpt_jax.errors import InputError
from kogpt_jax.kv_cache import KVCache, pages_per_row
from kogpt_jax.nan_guard import Check, NanGuard, no_check
from kogpt_jax.packing import Packed
from kogpt_jax.quantize import SCALE_SUFFIX, quantize_leaf
from kogpt_jax.sharding import ONE_DEVICE, Split, named_sharding, partition_spec
from kogpt_jax.vocabulary import Vocabulary

DEFAULT_OPS = OpsConfig()

# Values of an INT8 matrix that are converted at a time, for a product with whole sequences.
TILE_SIZE = 1 << 24

NO_LAYER = -1  # stands for the layer of a block that is left over

# From what ``w_in`` made of a layer's tokens, [T, 3 N H] and [T, K], to the second with attention's part filled in, and
# what the phase keeps of the layer: its updated pages, or nothing.
Attend = Callable[[Array, Array], tuple[Array, tuple[Pages, ...]]]

# Takes a block, the residual stream in front of it, [T, D], and its ``w_out``'s input, [T, K].
Watch = Callable[["Block", Array, Array], None]


class Embed(nnx.Module):
    """Token embedding. GPT-J has no position embedding: rotary does that in attention."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.embedding = _param((vocabulary.padded_size, config.model_dim), ("vocab", "embed"), config)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        with jax.named_scope("embedding"):
            return self.vocabulary.lookup(self.embedding[...], tokens).astype(jnp.float32)


class Block(nnx.Module):
    """One layer: LayerNorm -> ``w_in`` -> attention beside GELU -> ``w_out`` -> sum over shards -> residual."""

    def __init__(self, config: ModelConfig, split: Split, ops: OpsConfig):
        model_dim, ffn_dim = config.model_dim, config.ffn_dim
        stages, shards = split
        local_dim, local_ffn = model_dim // shards, ffn_dim // shards
        self.config = config
        self.ops = ops
        self.num_shards = shards
        self.num_local_heads = config.num_heads // shards
        self.ln_scale = _param((stages, model_dim), ("stage", "embed"), config, mean=1.0)
        self.ln_bias = _param((stages, model_dim), ("stage", "embed"), config)
        # Output-major: the K values of each output lie together, which decode kernels and INT8 tensor cores want.
        self.w_in, self.w_in_scale = _matrix(
            (stages, shards, 3 * local_dim + local_ffn, model_dim),
            ("stage", "tensor_shard", "fused", "embed"),
            config,
            k_axes=(3,),
            parts=(local_dim, local_dim, local_dim, local_ffn),
        )
        self.b_ffn_in = _param(
            (stages, shards, local_ffn), ("stage", "tensor_shard", "fused"), config, parts=(local_ffn,)
        )
        # K is attention's and the FFN's part of every shard: an output has one scale over all of them.
        self.w_out, self.w_out_scale = _matrix(
            (stages, shards, model_dim, local_dim + local_ffn),
            ("stage", "tensor_shard", "embed", "fused"),
            config,
            k_axes=(1, 3),
            parts=(local_dim, local_ffn),
        )
        self.w_out_multiplier = _multiplier(
            (stages, shards, local_dim + local_ffn),
            ("stage", "tensor_shard", "fused"),
            config,
            parts=(local_dim, local_ffn),
        )
        self.b_ffn_out = _param((stages, model_dim), ("stage", "embed"), config)

    def __call__(
        self, x: Float[Array, "T D"], attend: Attend, layer: int = 0, check: Check = no_check
    ) -> tuple[Float[Array, "T D"], tuple[Pages, ...]]:
        """Many tokens, of whatever rows: only ``attend`` knows which belong together. ``layer`` is for ``check``."""
        config = self.config
        local_dim = self.num_local_heads * config.head_dim
        with jax.named_scope("w_in"):
            qkv, act = prefill_linear(
                x,
                _local_weight(self.w_in, self.w_in_scale),
                config,
                self.ops,
                layer_norm=(_local(self.ln_scale, 1), _local(self.ln_bias, 1), config.layer_norm_epsilon),
                bias=_local(self.b_ffn_in, 1),
                gelu_from=3 * local_dim,
                act_dim=local_dim + self.b_ffn_in.shape[-1],
                is_y_cut=self.ops.prefill_attention == "reference",
            )
        assert act is not None  # with gelu_from
        ffn = act
        check("w_in", layer, lambda: (qkv[:, : 3 * local_dim], ffn[:, local_dim:]))
        with jax.named_scope("attention"):
            act, kept = attend(qkv, act)
        check("attention", layer, lambda: (act[:, :local_dim],))
        with jax.named_scope("w_out"):
            w_out, bias = _local_weight(self.w_out, self.w_out_scale), _local(self.b_ffn_out, 1)
            options: dict[str, Any] = {"k_multiplier": self._local_multiplier()}
            if self.num_shards == 1:
                x, _ = prefill_linear(act, w_out, config, self.ops, bias=bias, residual=x, **options)
            else:
                out, _ = prefill_linear(act, w_out, config, self.ops, out_dtype=jnp.float32, **options)
                x = x + jax.lax.psum(out, "tensor") + bias.astype(jnp.float32)
        check("w_out", layer, lambda: (x,))
        return x, kept

    def product_inputs(
        self, x: Float[Array, "T D"], act: Float[Array, "T K"]
    ) -> tuple[Float[Array, "T D"], Float[Array, "T K"]]:
        """What ``w_in`` and ``w_out`` multiply, given what goes into the block and what attention and GELU make."""
        multiplier = self._local_multiplier()
        h = layer_norm(x, _local(self.ln_scale, 1), _local(self.ln_bias, 1), self.config)
        return h, act if multiplier is None else act * multiplier

    def _local_multiplier(self) -> Array | None:
        return None if self.w_out_multiplier is None else _local(self.w_out_multiplier, 1)

    def decode_step(
        self,
        x: Float[Array, "B D"],
        rotary: tuple[Array, Array],
        layer: int,
        cache: KVCache,
        num_new: Int[Array, " B"],
        semaphores: Array,
        check: Check,
    ) -> tuple[Float[Array, "B D"], tuple[Pages, Pages], Array]:
        """One token a row. Both products' inputs lie in one buffer ``act``: GELU fills the FFN's part of it, attention
        its own.

        Returns:
            The residual stream, the layer's pages with the new tokens, the semaphores.
        """
        config = self.config
        local_dim = self.num_local_heads * config.head_dim
        # ``w_out`` begins with GELU's columns, while attention still fills its own where no kernel of its own first
        # rounds or multiplies all of ``w_out``'s input.
        mark = 0 if config.has_multiplier else layer + 1
        leaves_room = mark > 0 and (config.quant == "none" or x.shape[0] <= MAX_EARLY_ROWS_INT8)
        qkv, act, semaphores = self._decode_w_in(x, semaphores, mark)
        check("w_in", layer, lambda: (qkv, act[:, local_dim:]))
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
                leaves_room=leaves_room,
                implementation=self.ops.decode_attention,
            )
        check("attention", layer, lambda: (act[:, :local_dim],))
        x, semaphores = self._decode_w_out(act, x, semaphores, mark)
        check("w_out", layer, lambda: (x,))
        return x, (k_pages, v_pages), semaphores

    def decode_layer(self) -> DecodeLayer:
        """This device's parameters, as `custom_ops.decode_layers` takes them."""
        return DecodeLayer(
            ln_scale=_local(self.ln_scale, 1),
            ln_bias=_local(self.ln_bias, 1),
            w_in=_local_weight(self.w_in, self.w_in_scale),
            b_ffn_in=_local(self.b_ffn_in, 1),
            w_out=_local_weight(self.w_out, self.w_out_scale),
            k_multiplier=self._local_multiplier(),
            b_ffn_out=_local(self.b_ffn_out, 1),
        )

    def last_tokens(
        self,
        x: Float[Array, "T D"],
        attend: Attend,
        last: Int[Array, " B"],
        layer: int = 0,
        check: Check = no_check,
    ) -> tuple[Float[Array, "B D"], tuple[Pages, ...]]:
        """`__call__` where only the tokens at ``last`` are needed behind this layer: queries, keys and values of all
        tokens, and the rest of these alone, by a decode step's products."""
        config = self.config
        local_dim = self.num_local_heads * config.head_dim

        def in_place(rows: Array) -> Array:
            return jnp.zeros((x.shape[0], rows.shape[1]), rows.dtype).at[last].set(rows)

        with jax.named_scope("w_in"):
            qkv, _ = prefill_linear(
                x,
                _local_weight(self.w_in, self.w_in_scale)[: 3 * local_dim],
                config,
                self.ops,
                layer_norm=(_local(self.ln_scale, 1), _local(self.ln_bias, 1), config.layer_norm_epsilon),
            )
        _, act, semaphores = self._decode_w_in(x[last], make_semaphores())
        check("w_in", layer, lambda: (qkv, in_place(act[:, local_dim:])))
        with jax.named_scope("attention"):
            out, kept = attend(qkv, jnp.zeros((x.shape[0], local_dim), config.jax_dtype))
        check("attention", layer, lambda: (out,))
        act = jnp.concatenate([out[last], act[:, local_dim:]], axis=1)
        last_x, _ = self._decode_w_out(act, x[last], semaphores)
        check("w_out", layer, lambda: (in_place(last_x),))
        return last_x, kept

    def _decode_w_in(self, x: Float[Array, "B D"], semaphores: Array, mark: int = 0) -> tuple[Array, ...]:
        """(qkv, act, semaphores), with GELU's columns in ``act``; ``mark`` tells that they are there."""
        local_dim = self.num_local_heads * self.config.head_dim
        with jax.named_scope("w_in"):
            return decode_linear(
                x,
                _local_weight(self.w_in, self.w_in_scale),
                self.ops,
                semaphores,
                done_mark=mark,
                layer_norm=(_local(self.ln_scale, 1), _local(self.ln_bias, 1), self.config.layer_norm_epsilon),
                bias=_local(self.b_ffn_in, 1),
                gelu_from=3 * local_dim,
                act_dim=local_dim + self.b_ffn_in.shape[-1],
                int8_activations=self.config.quant == "w8a8",
            )

    def _decode_w_out(
        self, act: Float[Array, "B K"], x: Float[Array, "B D"], semaphores: Array, mark: int = 0
    ) -> tuple[Float[Array, "B D"], Array]:
        """(the residual stream behind the layer, semaphores)."""
        ops = self.ops
        local_dim = self.num_local_heads * self.config.head_dim
        with jax.named_scope("w_out"):
            w_out, bias = _local_weight(self.w_out, self.w_out_scale), _local(self.b_ffn_out, 1)
            options: dict[str, Any] = {
                "k_multiplier": self._local_multiplier(),
                "early": EarlyColumns(local_dim, mark) if mark else None,
                "int8_activations": self.config.quant == "w8a8",
            }
            if self.num_shards == 1:
                x, semaphores = decode_linear(act, w_out, ops, semaphores, bias=bias, residual=x, **options)
            else:
                out, semaphores = decode_linear(act, w_out, ops, semaphores, out_dtype=jnp.float32, **options)
                x = sum_over(out, ("tensor",), ops, bias=bias, residual=x)
        return x, semaphores


class GPTJ(nnx.Module):
    """The whole model, or a stage of it: ``blocks`` are those of this device's stage. Built only abstractly
    (`model_def`); its leaves are held apart and merged inside the jit."""

    def __init__(self, config: ModelConfig, split: Split, ops: OpsConfig, guard: NanGuard | None = None):
        self.config = config
        self.ops = ops
        self.guard = guard
        self.vocabulary = Vocabulary(config.vocab_size, math.prod(split), ops)
        self.embed = Embed(config, self.vocabulary)
        self.blocks = nnx.List([Block(config, split, ops) for _ in range(split.layers_per_stage(config.num_layers))])
        self.ln_f_scale = _param((config.model_dim,), ("embed",), config, mean=1.0)
        self.ln_f_bias = _param((config.model_dim,), ("embed",), config)
        self.lm_head, self.lm_head_scale = _matrix(
            (self.vocabulary.padded_size, config.model_dim), ("vocab", "embed"), config, k_axes=(1,)
        )
        self.lm_head_bias = _param((self.vocabulary.padded_size,), ("vocab",), config)

    def prefill(
        self,
        x: Float[Array, "T D"],
        packed: Packed,
        cache: KVCache,
        watch: Watch | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Float[Array, "tokens D"], KVCache]:
        """Reads new tokens of each row, which see those of the row in the cache and one another, causally.

        Args:
            x: the residual stream before the first of these layers: the tokens' embedding, if there is one stage.
            packed: one data shard's tokens.
            cache: the tokens before. With pages of one layer only, all layers use these in turn: for rows that begin
                here and are not gone on with.
            watch: is given each block, what goes into it, and ``w_out``'s input.
            last_only: give back each row's last token alone, [B, D], which saves most of the last layer.

        Returns:
            The residual stream behind the last of the layers, which means nothing for tokens of no row; the cache with
            the tokens.
        """
        begins, num_new = packed.begins, packed.num_new
        row_of_token, index, is_token = token_rows(begins, num_new, packed.tokens.shape[0])
        last = jnp.maximum(begins + num_new - 1, 0)
        # Of few tokens the products take as long as of the last ones alone, and no weight need be cut.
        cuts_last = last_only and x.shape[0] > self.ops.linear_prefill_tokens
        positions = cache.lengths[row_of_token] + index
        rotary = rotary_tables(positions, self.config)
        page_table = cache.page_table[:, : pages_per_row(packed.max_len)]
        new_pages: list[tuple[Pages, ...]] = list(zip(cache.k, cache.v, strict=True))
        check: Check = no_check
        if self.guard is not None:
            check = self.guard.for_rows("prefill", x, cache.lengths, row_of_token, positions, is_token)
        for layer, block in enumerate(self.blocks):
            slot = layer % len(new_pages)

            def attend(
                qkv: Array, act: Array, slot: int = slot, block: Block = block, x: Array = x
            ) -> tuple[Array, tuple[Pages, ...]]:
                act, k_pages, v_pages, _ = prefill_attention(
                    qkv,
                    rotary,
                    new_pages[slot][0],
                    new_pages[slot][1],
                    page_table,
                    begins,
                    num_new,
                    cache.lengths,
                    act,
                    max_new=packed.max_len,
                    implementation=self.ops.prefill_attention,
                )
                if watch is not None:
                    watch(block, x, act)
                return act, (k_pages, v_pages)

            if cuts_last and layer == len(self.blocks) - 1:
                x, new_pages[slot] = block.last_tokens(x, attend, last, layer, check)
            else:
                x, new_pages[slot] = block(x, attend, layer, check)
        if last_only and not cuts_last:
            x = x[last]
        return x, _with_pages(cache, new_pages, cache.lengths + num_new)

    def decode_step(
        self, x: Float[Array, "B D"], num_new: Int[Array, " B"], cache: KVCache, semaphores: Array
    ) -> tuple[Float[Array, "B D"], KVCache, Array]:
        """Appends one token a row and attends to all of the row.

        Args:
            x: the residual stream before the first of these layers, of the tokens that follow the cached ones.
            num_new: 1 for a running row; 0 for a finished one, whose cache and length stay as they are.
            cache: the tokens before.
            semaphores: from ``custom_ops.make_semaphores``.

        Returns:
            The residual stream behind the last of the layers (that of a finished row means nothing), the cache, the
            semaphores.
        """
        if self._is_one_call(x.shape[0]):
            x, _, cache, semaphores = self._decode_layers(x, num_new, cache, semaphores, None)
            return x, cache, semaphores
        rotary = rotary_tables(cache.lengths, self.config)
        check: Check = no_check
        if self.guard is not None:
            rows = jnp.arange(x.shape[0])
            check = self.guard.for_rows("decode_step", x, cache.lengths, rows, cache.lengths, num_new > 0)
        new_pages = []
        for layer, block in enumerate(self.blocks):
            x, layer_pages, semaphores = block.decode_step(x, rotary, layer, cache, num_new, semaphores, check)
            new_pages.append(layer_pages)
        return x, _with_pages(cache, new_pages, cache.lengths + num_new), semaphores

    def decode_step_to_logits(
        self, x: Float[Array, "B D"], num_new: Int[Array, " B"], cache: KVCache, semaphores: Array
    ) -> tuple[Float[Array, "B local_V"], KVCache, Array]:
        """`decode_step` and `next_logits`, where one stage has all layers: (logits, cache, semaphores)."""
        if not self._is_one_call(x.shape[0]):
            x, cache, semaphores = self.decode_step(x, num_new, cache, semaphores)
            logits, semaphores = self.next_logits(x, semaphores)
            return logits, cache, semaphores
        _, logits, cache, semaphores = self._decode_layers(x, num_new, cache, semaphores, self._decode_head())
        return self.vocabulary.without_padding(logits), cache, semaphores

    def takes_steps(self, rows: int) -> bool:
        """Whether greedy steps are one call of `decode_steps`."""
        return self.ops.decode_steps == "ffi" and self._is_one_call(rows)

    def decode_steps(
        self,
        tokens: Int[Array, " B"],
        num_remaining: Int[Array, " B"],
        ignore_eos: Bool[Array, " B"],
        cache: KVCache,
        semaphores: Array,
        num_steps: int,
    ) -> tuple[DecodedSteps, KVCache]:
        """Greedy steps as one call: what `custom_ops.decode_steps` returns, and the cache that is a part of it."""
        with jax.named_scope("decode_steps"):
            steps = decode_steps(
                tokens,
                cache.lengths,
                num_remaining,
                ignore_eos,
                self.embed.embedding[...],
                rotary_tables(jnp.arange(cache.max_len), self.config),
                [block.decode_layer() for block in self.blocks],
                cache.k,
                cache.v,
                cache.page_table,
                num_steps=num_steps,
                vocab_size=self.config.vocab_size,
                eos_token_ids=self.config.eos_token_ids,
                head=self._decode_head(),
                semaphores=semaphores,
                **self._call_options(),
            )
        return steps, _with_pages(cache, list(zip(steps.k_pages, steps.v_pages, strict=True)), steps.lengths)

    def _decode_head(self) -> DecodeHead:
        """As `custom_ops.decode_layers` takes it."""
        return DecodeHead(
            self.ln_f_scale[...],
            self.ln_f_bias[...],
            _local_weight(self.lm_head, self.lm_head_scale),
            self.lm_head_bias[...],
        )

    def _call_options(self) -> dict[str, Any]:
        """How the layers run as one call."""
        has_shards = self.blocks[0].num_shards > 1
        return {
            "epsilon": self.config.layer_norm_epsilon,
            "sum_over": ("tensor",) if has_shards else None,
            "device_groups": device_groups(self.ops.devices, ("tensor",)) if has_shards else (),
            "prefetch_weights": True,  # arguments of the jitted phases: no kernel writes them
            "int8_activations": self.config.quant == "w8a8",
            "implementation": "ffi",
        }

    def _is_one_call(self, rows: int) -> bool:
        """Whether the layers run as one call: the guard looks between their ops."""
        has_sums = self.blocks[0].num_shards == 1 or is_kernel((rows, self.config.model_dim), self.ops)
        return self.ops.decode_layers == "ffi" and rows <= MAX_ROWS and has_sums and self.guard is None

    def _decode_layers(
        self, x: Array, num_new: Array, cache: KVCache, semaphores: Array, head: DecodeHead | None
    ) -> tuple[Array, Any, KVCache, Array]:
        """(x, logits or None, cache, semaphores) of `custom_ops.decode_layers`."""
        with jax.named_scope("decode_layers"):
            x, logits, k, v, semaphores = decode_layers(
                x,
                [block.decode_layer() for block in self.blocks],
                rotary_tables(cache.lengths, self.config),
                cache.k,
                cache.v,
                cache.page_table,
                cache.lengths,
                num_new,
                head=head,
                semaphores=semaphores,
                **self._call_options(),
            )
        new_pages = list(zip(k, v, strict=True))
        return x, logits, _with_pages(cache, new_pages, cache.lengths + num_new), semaphores

    def next_logits(self, x: Float[Array, "B D"], semaphores: Array) -> tuple[Float[Array, "B local_V"], Array]:
        """`logits` of a decode step, by its kernels: (logits, semaphores)."""
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
            return self._checked_logits(x, logits), semaphores

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B local_V"]:
        """Logits in f32 from the residual stream behind the last layer, of this device's shard of the vocabulary."""
        with jax.named_scope("lm_head"):
            hidden = self._final_norm(x)
            weight = _local_weight(self.lm_head, self.lm_head_scale)
            logits = dense(hidden, weight, jnp.float32) + self.lm_head_bias[...].astype(jnp.float32)
            return self._checked_logits(x, logits)

    def _checked_logits(self, x: Float[Array, "*B D"], logits: Float[Array, "*B local_V"]) -> Array:
        if self.guard is not None:
            check = self.guard.for_last_ops(x)
            check("ln_f", None, lambda: (self._final_norm(x),))
            check("lm_head", None, lambda: (jnp.maximum(logits, 0),))  # -inf bans a token
        return self.vocabulary.without_padding(logits)

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
    done_mark: int = 0,
    early: EarlyColumns | None = None,
    **arguments: Any,
) -> tuple[Array, ...]:
    """`custom_ops.linear` as ``ops`` says for this many rows; more than a kernel takes run in groups."""
    rows = x.shape[0]
    implementation = ops.linear if rows <= MAX_ROWS else ops.linear_many_rows
    group_len = rows if implementation == "reference" else MAX_ROWS
    if rows <= group_len:  # a mark tells of one call
        arguments |= {"done_mark": done_mark, "early": early}
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
    x: Float[Array, "T K"],
    weight: Float[Array, "M K"] | QuantizedArray,
    config: ModelConfig,
    ops: OpsConfig,
    *,
    layer_norm: tuple[Array, Array, float] | None = None,
    k_multiplier: Array | None = None,
    bias: Array | None = None,
    residual: Float[Array, "T M"] | None = None,
    gelu_from: int | None = None,
    act_dim: int | None = None,
    out_dtype: np.dtype | type | None = None,
    is_y_cut: bool = True,
) -> tuple[Array, Array | None]:
    """A layer's product for whole sequences, with what `custom_ops.linear` has around it: (y, act).

    ``quant="w8a8"`` rounds the activations to INT8, a scale a token, or as `linear` does where that reads them. Of
    ``act``, [T, act_dim], the columns in front of GELU's are attention's to fill. Without ``is_y_cut`` y may have more
    columns than ``gelu_from``: to cut XLA's product for a kernel would copy it.
    """
    options: dict[str, Any] = {
        "bias": bias,
        "residual": residual,
        "gelu_from": gelu_from,
        "act_dim": act_dim,
        "out_dtype": out_dtype,
    }
    in_front: dict[str, Any] = {"layer_norm": layer_norm, "k_multiplier": k_multiplier}
    is_w8a8 = config.quant == "w8a8"
    if x.shape[0] <= ops.linear_prefill_tokens:
        outputs = decode_linear(x, weight, ops, make_semaphores(), int8_activations=is_w8a8, **in_front, **options)
        return outputs[0], None if gelu_from is None else outputs[1]
    if is_w8a8:
        assert isinstance(weight, QuantizedArray)
        quantized = quantize_rows(x, implementation=ops.gemm, **in_front)
        return int8_gemm(quantized, weight, dtype=config.jax_dtype, implementation=ops.gemm, **options)
    if layer_norm is not None:
        x = numerics.layer_norm(x, *layer_norm).astype(config.jax_dtype)
    if k_multiplier is not None:
        x = (x.astype(jnp.float32) * k_multiplier).astype(config.jax_dtype)
    if isinstance(weight, QuantizedArray) and ops.gemm == "ffi":
        return mixed_gemm(x, weight, implementation="ffi", **options)
    if isinstance(weight, QuantizedArray) and ops.gemm == "linear":
        return _linear_in_groups(x, weight, **options)
    y, act = _dense_with(x, weight, config, **options)
    return (y[:, :gelu_from] if is_y_cut else y), act


def _linear_in_groups(
    x: Float[Array, "T K"], weight: QuantizedArray, *, residual: Float[Array, "T M"] | None, **options: Any
) -> tuple[Array, Array | None]:
    """The kernel of `custom_ops.linear`, as many rows at a time as it takes, in a loop: the program stays small."""
    rows = x.shape[0]
    group_len = min(rows, MAX_ROWS)
    num_groups = -(-rows // group_len)

    def split(array: Array) -> Array:
        padding = num_groups * group_len - rows
        return jnp.pad(array, ((0, padding), (0, 0))).reshape(num_groups, group_len, array.shape[1])

    def run(semaphores: Array, group: tuple[Array, Array | None]) -> tuple[Array, list[Array]]:
        x, residual = group
        *outputs, semaphores = linear(
            x, weight, residual=residual, semaphores=semaphores, implementation="ffi", **options
        )
        return semaphores, outputs

    groups = (split(x), None if residual is None else split(residual))
    _, outputs = jax.lax.scan(run, make_semaphores(), groups)
    # XLA on GPUs would make the cut a part of the kernel's call behind it, which then updates nothing in place.
    cut = [output.reshape(num_groups * group_len, output.shape[2])[:rows] for output in outputs]
    y, *more = jax.lax.optimization_barrier(cut)
    return y, more[0] if more else None


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
    """`dense`, and behind it what `prefill_linear` adds; y is not cut."""
    if gelu_from is None:
        y = dense(x, weight, jnp.float32 if residual is not None else out_dtype or config.jax_dtype)
        if residual is not None:
            y = residual + y
        return y if bias is None else y + bias.astype(jnp.float32), None
    y = dense(x, weight, config.jax_dtype)
    ffn = y[:, gelu_from:].astype(jnp.float32)
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


def _with_pages(cache: KVCache, new_pages: Sequence[tuple[Pages, ...]], lengths: Array) -> KVCache:
    k, v = zip(*new_pages, strict=True)
    return dataclasses.replace(cache, k=k, v=v, lengths=lengths)


def _param(
    shape: tuple[int, ...],
    logical_axes: tuple[str, ...],
    config: ModelConfig,
    *,
    mean: float = 0.0,
    parts: tuple[int, ...] = (),
) -> nnx.Param:
    """A parameter's one declaration; `model_def` reads it back as a `ParamSpec`."""
    return _declared(shape, config.jax_dtype, logical_axes, mean, parts)


def _matrix(
    shape: tuple[int, ...],
    logical_axes: tuple[str, ...],
    config: ModelConfig,
    *,
    k_axes: tuple[int, ...],
    parts: tuple[int, ...] = (),
) -> tuple[nnx.Param, nnx.Param | None]:
    """A weight matrix and, where it is quantised, its scales: the same rank with 1 along K."""
    if config.quant == "none":
        return _param(shape, logical_axes, config, parts=parts), None
    scale_shape = tuple(1 if axis in k_axes else extent for axis, extent in enumerate(shape))
    scale_axes = tuple(None if axis in k_axes else name for axis, name in enumerate(logical_axes))
    return (
        _declared(shape, jnp.int8, logical_axes, 0.0, parts),
        _declared(scale_shape, jnp.float32, scale_axes, 0.0, ()),
    )


def _multiplier(
    shape: tuple[int, ...], logical_axes: tuple[str, ...], config: ModelConfig, *, parts: tuple[int, ...]
) -> nnx.Param | None:
    """What the inputs of a matrix are multiplied with, where the model has such: f32, since kernels take no other."""
    return _declared(shape, jnp.float32, logical_axes, 1.0, parts) if config.has_multiplier else None


def _declared(
    shape: tuple[int, ...], dtype: Any, logical_axes: tuple[str | None, ...], mean: float, parts: tuple[int, ...]
) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), logical_axes=logical_axes, init_mean=mean, parts=parts)


def _local(param: nnx.Param, ndim: int) -> Array:
    """A parameter as a device computes with it: without the axes of stages and of tensor shards, 1 each there."""
    return param[...].reshape(param.shape[-ndim:])


def _local_weight(weight: nnx.Param, scale: nnx.Param | None) -> Array | QuantizedArray:
    """A matrix as a device multiplies by it."""
    return _local(weight, 2) if scale is None else QuantizedArray(_local(weight, 2), _local(scale, 2))


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a parameter is: its path in the module, global shape, dtype, logical axes, the mean it is drawn around, and
    the extents that lie behind one another on its "fused" axis, of one tensor shard."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    logical_axes: tuple[str | None, ...]
    init_mean: float
    parts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDef:
    """The model without its leaves: split once, hashable, and a static argument of the jitted phases."""

    config: ModelConfig
    split: Split
    ops: OpsConfig
    params: tuple[ParamSpec, ...]  # in the order of the leaves
    _graphdef: nnx.GraphDef[GPTJ]
    _treedef: jax.tree_util.PyTreeDef

    @property
    def layers_per_stage(self) -> int:
        """Blocks of a stage, and arrays of a cache."""
        return self.split.layers_per_stage(self.config.num_layers)

    @property
    def vocabulary(self) -> Vocabulary:
        """How the tokens lie over the mesh."""
        return Vocabulary(self.config.vocab_size, math.prod(self.split), self.ops)

    def merge(self, leaves: Sequence[Array]) -> GPTJ:
        """The module over these leaves (global outside, local inside `jax.shard_map`), in the order of ``params``."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def leaf_specs(self) -> list[jax.sharding.PartitionSpec]:
        """The partition of each leaf."""
        return [partition_spec(param.logical_axes) for param in self.params]


@functools.cache
def model_def(
    config: ModelConfig, split: Split = ONE_DEVICE, ops: OpsConfig = DEFAULT_OPS, guard: NanGuard | None = None
) -> ModelDef:
    """The definition of a model that is cut this way; one object per argument, so that jit's cache holds. The
    parameters depend on neither ``ops`` nor ``guard``.

    Raises:
        InputError: heads or FFN units that the tensor shards cannot share evenly.
    """
    for name in ("num_heads", "ffn_dim"):
        extent = getattr(config, name)
        if extent % split.num_shards:
            raise InputError(f"{name} {extent} is not a multiple of the {split.num_shards} tensor shards")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GPTJ(config, split, ops, guard)))
    leaves, treedef = jax.tree.flatten(state)
    variables = nnx.to_flat_state(state)
    params = []
    for leaf, (path, variable) in zip(leaves, variables, strict=True):
        name = ".".join(str(part) for part in path).removeprefix("embed.")
        metadata = {key: variable.get_metadata()[key] for key in ("logical_axes", "init_mean", "parts")}
        params.append(ParamSpec(name, leaf.shape, leaf.dtype, **metadata))
    return ModelDef(config, split, ops, tuple(params), graphdef, treedef)


def random_leaves(config: ModelConfig, mesh: Mesh, *, seed: int = 0, std: float = 0.02) -> list[jax.Array]:
    """Random leaves made on the devices: normal with ``std`` (GPT-J's ``initializer_range``) around 1 for LayerNorm's
    scales and 0 for the rest, so that no bias is zero in a test. Quantised ones are made of those of the same seed.

    The same model on any mesh: a value depends on its parameter, layer and place in the unsplit one. Each device draws
    its own, none holds a whole leaf that is split.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    unquantized = dataclasses.replace(config, quant="none")
    split = Split.of(mesh)
    specs = {spec.path: spec for spec in model_def(config, split).params}
    order = {param.path: index for index, param in enumerate(model_def(unquantized).params)}
    leaves: dict[str, Array] = {}
    for param in model_def(unquantized, split).params:
        indices = [order[param.path]]
        if "stage" in param.logical_axes:
            _, block, name = param.path.split(".")
            layers = split.layers_of_block(int(block), config.num_layers)
            indices = [order.get(f"blocks.{layer}.{name}", NO_LAYER) for layer in layers]
        draw = _normal(dataclasses.replace(param, path=""), config.vocab_size, std, mesh)
        leaf = draw(key, jnp.asarray(np.array(indices, np.int32)))
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
def _normal(param: ParamSpec, vocab_size: int, std: float, mesh: Mesh) -> Callable[[Array, Array], Array]:
    """From a key and the parameter's number on each stage, `NO_LAYER` for none, to a leaf: jitted, once for all leaves
    of one kind."""
    axes = param.logical_axes

    def draw(key: Array, index: Array) -> Array:
        key = jax.random.fold_in(key, index)
        if "tensor_shard" in axes:
            # Part by part as in the unsplit weight, whose rows or columns the shards then share.
            num_shards, shape = param.shape[1], param.shape[2:]
            fused = axes.index("fused") - 2
            parts = []
            for number, extent in enumerate(param.parts):
                whole = (*shape[:fused], num_shards, extent, *shape[fused + 1 :])
                part = jax.random.normal(jax.random.fold_in(key, number), whole, jnp.float32)
                parts.append(jnp.moveaxis(part, fused, 0))
            values = jnp.concatenate(parts, axis=1 + fused)
        else:
            values = jax.random.normal(key, param.shape["stage" in axes :], jnp.float32)
        values = param.init_mean + std * values
        if "vocab" in axes:
            is_token = jnp.arange(param.shape[0]) < vocab_size
            values = jnp.where(is_token.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
        return jnp.where(index == NO_LAYER, 0, values).astype(param.dtype)

    def draw_stages(key: Array, indices: Array) -> Array:
        return jax.vmap(draw, (None, 0))(key, indices) if "stage" in axes else draw(key, indices[0])

    return jax.jit(draw_stages, out_shardings=named_sharding(mesh, axes))
