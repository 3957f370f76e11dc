"""GPT-J as Flax NNX modules: what one device computes on its local shards, inside `jax.shard_map`.

Attention and FFN of a GPT-J layer share one LayerNorm and one residual, so a layer is two products: ``w_in`` makes
queries, keys, values and the FFN's hidden units, ``w_out`` takes attention's and the FFN's outputs back, and one
`psum` follows. The phases differ only in how they attend: each hands `Block` a function from local q, k, v to
attention's output.

The numeric oracle is Hugging Face's ``GPTJForCausalLM`` in f32. Products run in the model's dtype and accumulate in
f32; LayerNorm, softmax, rotary embedding and the residual stream are f32 whatever the dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kogpt_jax import kv_cache
from kogpt_jax.config import ModelConfig
from kogpt_jax.kv_cache import KVCache
from kogpt_jax.sharding import named_sharding, partition_spec

# Longer prompts attend in blocks of this many queries, so that scores take [B, N, block, T] and not [B, N, T, T].
QUERY_BLOCK = 512

# From a layer's local q, k, v to attention's output and what the phase keeps of the layer: its updated pages, or
# nothing.
Attend = Callable[[Array, Array, Array], tuple[Array, tuple[Array, ...]]]


class Embed(nnx.Module):
    """Token embedding. GPT-J has no position embedding: rotary does that in attention."""

    def __init__(self, config: ModelConfig):
        self.embedding = _param((config.vocab_size, config.model_dim), ("vocab", "embed"), config)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embedding[...][tokens].astype(jnp.float32)


class Block(nnx.Module):
    """One layer: LayerNorm -> ``w_in`` -> attention beside GELU -> ``w_out`` -> psum -> residual."""

    def __init__(self, config: ModelConfig, num_shards: int):
        model_dim, ffn_dim = config.model_dim, config.ffn_dim
        local_dim, local_ffn = model_dim // num_shards, ffn_dim // num_shards
        self.config = config
        self.num_local_heads = config.num_heads // num_shards
        self.ln_scale = _param((model_dim,), ("embed",), config, mean=1.0)
        self.ln_bias = _param((model_dim,), ("embed",), config)
        # Output-major: the K values of each output lie together, which decode kernels and INT8 tensor cores want.
        self.w_in = _param(
            (num_shards, 3 * local_dim + local_ffn, model_dim), ("tensor_shard", "fused", "embed"), config
        )
        self.b_ffn_in = _param((num_shards, local_ffn), ("tensor_shard", "fused"), config)
        self.w_out = _param((num_shards, model_dim, local_dim + local_ffn), ("tensor_shard", "embed", "fused"), config)
        self.b_ffn_out = _param((model_dim,), ("embed",), config)

    def __call__(self, x: Float[Array, "B T D"], attend: Attend) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        config = self.config
        batch, q_len, _ = x.shape
        local_dim = self.num_local_heads * config.head_dim
        with jax.named_scope("w_in"):
            h = layer_norm(x, self.ln_scale[...], self.ln_bias[...], config)
            y = linear(h, self.w_in[0], config.jax_dtype)
            q, k, v, ffn = jnp.split(y, (local_dim, 2 * local_dim, 3 * local_dim), axis=-1)
        with jax.named_scope("attention"):
            heads = (batch, q_len, self.num_local_heads, config.head_dim)
            attn, pages = attend(q.reshape(heads), k.reshape(heads), v.reshape(heads))
        with jax.named_scope("w_out"):
            ffn = jax.nn.gelu(ffn.astype(jnp.float32) + self.b_ffn_in[0].astype(jnp.float32), approximate=True)
            act = jnp.concatenate([attn.reshape(batch, q_len, local_dim), ffn.astype(config.jax_dtype)], axis=-1)
            out = jax.lax.psum(linear(act, self.w_out[0], jnp.float32), "tensor")
        return x + out + self.b_ffn_out[...].astype(jnp.float32), pages


class GPTJ(nnx.Module):
    """The whole model. Built only abstractly (`model_def`); its leaves are held apart and merged inside the jit."""

    def __init__(self, config: ModelConfig, num_shards: int):
        self.config = config
        self.embed = Embed(config)
        self.blocks = nnx.List([Block(config, num_shards) for _ in range(config.num_layers)])
        self.ln_f_scale = _param((config.model_dim,), ("embed",), config, mean=1.0)
        self.ln_f_bias = _param((config.model_dim,), ("embed",), config)
        self.lm_head = _param((config.vocab_size, config.model_dim), ("vocab", "embed"), config)
        self.lm_head_bias = _param((config.vocab_size,), ("vocab",), config)

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Final hidden states of every position, causal and without a cache: for scoring and training.

        A row may be padded on the right: a position sees only what stands before it.
        """
        rotary = rotary_tables(jnp.arange(tokens.shape[1])[None], self.config)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
            q, k = apply_rotary(q, k, rotary)
            return causal_attention(q, k, v), ()

        x = self.embed(tokens)
        for block in self.blocks:
            x, _ = block(x, attend)
        return self._final_norm(x)

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
        x = self.embed(tokens)
        new_pages = []
        for layer, block in enumerate(self.blocks):

            def attend(q: Array, k: Array, v: Array, layer: int = layer) -> tuple[Array, tuple[Array, ...]]:
                q, k = apply_rotary(q, k, rotary)
                return causal_attention(q, k, v), _append(cache, layer, k, v, positions, is_valid)

            x, pages = block(x, attend)
            new_pages.append(pages)
        # Of a row's positions only one meets lm_head.
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._final_norm(last), _with_pages(cache, new_pages, lengths)

    def decode_step(
        self, tokens: Int[Array, " B"], num_new: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """Appends one token a row and attends to all of the row.

        Args:
            tokens: the token that follows the cached ones.
            num_new: 1 for a running row; 0 for a finished one, whose cache and length stay as they are.
            cache: the tokens before.
        """
        positions = cache.lengths[:, None]
        is_valid = num_new[:, None] > 0
        lengths = cache.lengths + num_new
        rotary = rotary_tables(positions, self.config)
        x = self.embed(tokens[:, None])
        new_pages = []
        for layer, block in enumerate(self.blocks):

            def attend(q: Array, k: Array, v: Array, layer: int = layer) -> tuple[Array, tuple[Array, ...]]:
                q, k = apply_rotary(q, k, rotary)
                pages = _append(cache, layer, k, v, positions, is_valid)
                return decode_attention(q[:, 0], *pages, cache.page_table, lengths)[:, None], pages

            x, pages = block(x, attend)
            new_pages.append(pages)
        return self._final_norm(x[:, 0]), _with_pages(cache, new_pages, lengths)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in f32 from final hidden states."""
        with jax.named_scope("lm_head"):
            return linear(hidden, self.lm_head[...], jnp.float32) + self.lm_head_bias[...].astype(jnp.float32)

    def _final_norm(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return layer_norm(x, self.ln_f_scale[...], self.ln_f_bias[...], self.config)


def linear(x: Float[Array, "*B K"], weight: Float[Array, "M K"], out_dtype: np.dtype | type) -> Float[Array, "*B M"]:
    """``x @ weight.T``, accumulated in f32."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract_last, _precision(x), preferred_element_type=out_dtype)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], config: ModelConfig
) -> Float[Array, "*B D"]:
    """LayerNorm (Ba et al. 2016) in f32, returned in the model's dtype."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    normed = (x - mean) * jax.lax.rsqrt(variance + config.layer_norm_epsilon)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(config.jax_dtype)


def rotary_tables(
    positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """Cosines and sines of the rotary embedding (Su et al. 2021), R = rotary_dim / 2, with the heads' axis
    broadcast."""
    exponents = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
    frequencies = jnp.asarray(10000.0**-exponents, jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    q: Float[Array, "B T N H"], k: Float[Array, "B T N H"], rotary: tuple[Array, Array]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """Rotates the leading ``rotary_dim`` of each head; GPT-J pairs neighbours (2i, 2i + 1), not halves."""
    cos, sin = rotary
    rotary_dim = 2 * cos.shape[-1]
    qk = jnp.concatenate([q, k], axis=2)
    pairs = qk[..., :rotary_dim].astype(jnp.float32).reshape(*qk.shape[:-1], rotary_dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    rotated = rotated.reshape(*qk.shape[:-1], rotary_dim).astype(qk.dtype)
    # Once for both: XLA would else rotate q again for every key that it meets.
    qk = jax.lax.optimization_barrier(jnp.concatenate([rotated, qk[..., rotary_dim:]], axis=-1))
    return qk[:, :, : q.shape[2]], qk[:, :, q.shape[2] :]


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T N H"], v: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Each query attends to its own and earlier positions; scores and softmax in f32."""
    q_len = q.shape[1]
    outputs = []
    for start in range(0, q_len, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q_len)  # later keys are masked for the whole block: leave them out
        scores = _product("btnh,bsnh->bnts", q[:, start:stop], k[:, :stop]) / math.sqrt(q.shape[-1])
        is_visible = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
        probs = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)
        outputs.append(_product("bnts,bsnh->btnh", probs.astype(v.dtype), v[:, :stop]).astype(q.dtype))
    return jnp.concatenate(outputs, axis=1)


def decode_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "pages N page_len H"],
    v_pages: Float[Array, "pages N page_len H"],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
) -> Float[Array, "B N H"]:
    """One query a row attends to the row's first ``lengths[b]`` keys, at least one; scores and softmax in f32.

    On a CPU a loop goes over the pages that are used; elsewhere all pages of the table are multiplied at once, because
    there a loop whose end is computed makes the host wait.
    """
    return jax.lax.platform_dependent(
        q, k_pages, v_pages, page_table, lengths, cpu=_attend_page_after_page, default=_attend_all_pages
    )


def _attend_all_pages(q: Array, k_pages: Array, v_pages: Array, page_table: Array, lengths: Array) -> Array:
    """Each page is a product of its own (batch axes B, max_pages, N), so that the pages are multiplied as they lie;
    putting a row's pages in one piece first would copy and transpose the cache every step."""
    max_pages = page_table.shape[1]
    k = kv_cache.gather(k_pages, page_table)
    v = kv_cache.gather(v_pages, page_table)
    is_valid = kv_cache.valid_tokens(lengths, max_pages)[:, :, None, :]  # [B, max_pages, 1, page_len]
    q_by_page = jnp.broadcast_to(q[:, None], (q.shape[0], max_pages, *q.shape[1:]))
    scores = _product("bmnh,bmnph->bmnp", q_by_page, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(is_valid, scores, -jnp.inf)
    probs = jnp.exp(scores - jnp.max(scores, axis=(1, 3), keepdims=True))
    by_page = _product("bmnp,bmnph->bmnh", probs.astype(v.dtype), jnp.where(is_valid[..., None], v, 0))
    # Or XLA puts these sums into whatever reads them, one thread an output: 30 times slower at 8 rows on an H100.
    by_page, total = jax.lax.optimization_barrier((by_page, jnp.sum(probs, axis=(1, 3))))
    return (jnp.sum(by_page, axis=1) / total[..., None]).astype(q.dtype)


def _attend_page_after_page(q: Array, k_pages: Array, v_pages: Array, page_table: Array, lengths: Array) -> Array:
    """Online softmax (Milakov and Gimelshein 2018): maximum, sum and output so far are rescaled with each page. A page
    without a valid token for a row leaves that row's as they are, bit for bit."""
    page_len = k_pages.shape[2]

    def add_page(slot: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, out = so_far
        pages = page_table[:, slot][:, None]
        k, v = kv_cache.gather(k_pages, pages)[:, 0], kv_cache.gather(v_pages, pages)[:, 0]
        is_valid = (slot * page_len + jnp.arange(page_len) < lengths[:, None])[:, None]  # [B, 1, page_len]
        scores = _product("bnh,bnph->bnp", q, k) / math.sqrt(q.shape[-1])
        scores = jnp.where(is_valid, scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        rescale, probs = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum[..., None])
        weighted = _product("bnp,bnph->bnh", probs.astype(v.dtype), jnp.where(is_valid[..., None], v, 0))
        total = total * rescale + jnp.sum(probs, axis=-1)
        return new_maximum, total, out * rescale[..., None] + weighted

    num_pages = (jnp.max(lengths) + page_len - 1) // page_len
    lowest = jnp.full(q.shape[:2], jnp.finfo(jnp.float32).min)  # finite: -inf less -inf is NaN
    start = (lowest, jnp.zeros(q.shape[:2], jnp.float32), jnp.zeros(q.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(0, num_pages, add_page, start)
    return (out / total[..., None]).astype(q.dtype)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _precision(x: Array) -> jax.lax.Precision | None:
    """In f32 "highest" keeps TF32 out on GPUs; 16 bits are multiplied as they are."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _append(cache: KVCache, layer: int, k: Array, v: Array, positions: Array, is_valid: Array) -> tuple[Array, Array]:
    """A layer's pages of keys and of values with the new tokens in."""
    k_pages = kv_cache.append(cache.k[layer], k, cache.page_table, positions, is_valid)
    return k_pages, kv_cache.append(cache.v[layer], v, cache.page_table, positions, is_valid)


def _with_pages(cache: KVCache, new_pages: Sequence[tuple[Array, ...]], lengths: Array) -> KVCache:
    k, v = zip(*new_pages, strict=True)
    return dataclasses.replace(cache, k=k, v=v, lengths=lengths)


def _param(
    shape: tuple[int, ...], logical_axes: tuple[str, ...], config: ModelConfig, *, mean: float = 0.0
) -> nnx.Param:
    """A parameter's one declaration; `model_def` reads it back as a `ParamSpec`."""
    return nnx.Param(jnp.zeros(shape, config.jax_dtype), logical_axes=logical_axes, init_mean=mean)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a parameter is: its path in the module, global shape, dtype, logical axes and the mean it is drawn
    around."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    logical_axes: tuple[str, ...]
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
def model_def(config: ModelConfig, num_shards: int = 1) -> ModelDef:
    """The definition of the model for ``num_shards`` tensor shards; one object per argument, so that jit's cache
    holds."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GPTJ(config, num_shards)))
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
    scales and 0 for the rest, so that no bias is zero in a test."""
    key = jax.random.key(seed)
    leaves = []
    for index, param in enumerate(model_def(config, mesh.shape["tensor"]).params):
        sharding = named_sharding(mesh, param.logical_axes)
        draw = _normal(param.shape, param.dtype, param.init_mean, std, sharding)
        leaves.append(draw(jax.random.fold_in(key, index)))
    return leaves


@functools.cache
def _normal(
    shape: tuple[int, ...], dtype: np.dtype, mean: float, std: float, sharding: jax.sharding.NamedSharding
) -> Callable[[Array], Array]:
    def draw(key: Array) -> Array:
        return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
