"""Makes the demo model: tokenizer, token streams, training, export. Needs the extra ``train``; README.md says how.

Training uses the model's own layers, and departs from its forward in two things: rows are packed with documents and
attention is kept inside a document, and there is dropout on the embedding and on what each layer adds.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt16

from custom_ops.rotary import apply_rotary
from kogpt_jax import runtime
from kogpt_jax.config import DEMO, Dtype, ModelConfig
from kogpt_jax.demo import DIRECTORY, data, export
from kogpt_jax.errors import InputError
from kogpt_jax.model import ModelDef, dense, model_def, rotary_tables
from kogpt_jax.sharding import make_mesh

_SCALAR: Any = PartitionSpec()
_DECAYED = ("embedding", "lm_head", "w_in", "w_out")  # the matrices; biases and LayerNorms are left free


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run. Frozen, because it is a static argument of the jitted chunk of steps."""

    steps: int = 4000
    batch: int = 64  # rows a step
    row_len: int = 512  # tokens a row
    learning_rate: float = 3e-3  # at the end of the warm-up; a cosine takes it to zero
    warmup_steps: int = 200
    weight_decay: float = 0.5  # AdamW's: each step takes learning_rate * weight_decay of a matrix
    dropout: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.995  # of the averaged weights, which are what is measured and kept
    chunk: int = 200  # steps a dispatch; validation between
    seed: int = 0
    dtype: Dtype = "bf16"  # of the products; weights and their averages are f32

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "row_len", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.chunk:
            raise InputError(f"steps must be a multiple of chunk {self.chunk}, got {self.steps}")
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"warmup_steps must be at least 0 and below steps {self.steps}, got {self.warmup_steps}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "leaves", "averages", "optimizer"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
@no_type_check  # JAX puts other things than arrays into the same structure
class TrainState:
    """All that steps carry. Donated: the caller's copy is gone after a chunk."""

    step: Int[Array, ""]
    leaves: list[Array]  # f32
    averages: list[Array]  # f32
    optimizer: optax.OptState


def initial_state(config: TrainConfig, definition: ModelDef, mesh: Mesh) -> TrainState:
    """Normal weights, GPT-2's scheme: std 0.02, what is added to the residual stream smaller by sqrt(2 L)."""
    key = jax.random.key(config.seed)
    leaves = []
    for index, param in enumerate(definition.params):
        name = param.path.rpartition(".")[2]
        std = 0.02 if name in _DECAYED else 0.0
        if name == "w_out":
            std /= math.sqrt(2 * definition.config.num_layers)
        noise = jax.random.normal(jax.random.fold_in(key, index), param.shape, jnp.float32)
        leaves.append(param.init_mean + std * noise)
    optimizer = _optimizer(config, definition, jnp.int32(config.steps))
    state = TrainState(jnp.int32(0), leaves, [jnp.copy(leaf) for leaf in leaves], optimizer.init(leaves))
    return jax.device_put(state, NamedSharding(mesh, _SCALAR))


def _optimizer(config: TrainConfig, definition: ModelDef, num_steps: Int[Array, ""]) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019): linear warm-up, then a cosine that is 0 after ``num_steps``."""

    def learning_rate(step: Int[Array, ""]) -> Float[Array, ""]:
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        progress = jnp.clip((step - config.warmup_steps) / (num_steps - config.warmup_steps), 0.0, 1.0)
        return config.learning_rate * warmup * 0.5 * (1 + jnp.cos(math.pi * progress))

    is_decayed = [param.path.rpartition(".")[2] in _DECAYED for param in definition.params]
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate, b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=is_decayed),
    )


def visible(tokens: Int[Array, "B T"], modes: Int[Array, " B"]) -> Bool[Array, "B 1 T T"]:
    """Which earlier positions each position attends to.

    Mode 0 keeps a document and the [EOS] before it together, as held-out lines are measured. Mode 1 keeps a document
    alone, as a prompt is continued, which has no [EOS] before it. Mode 2 lets all of the row be seen, so that the model
    knows long contexts too.

        tokens            E a b E c      (E is [EOS])
        segments, mode 0  1 1 1 2 2      c sees E c
        segments, mode 1  0 1 1 1 2      c sees c; the second E sees a b E and predicts c
        segments, mode 2  0 0 0 0 0      c sees all
    """
    is_eos = (tokens == data.EOS_ID).astype(jnp.int32)
    started = jnp.cumsum(is_eos, axis=1)
    mode = modes[:, None]
    segments = jnp.where(mode == 0, started, jnp.where(mode == 1, started - is_eos, 0))
    is_same = segments[:, :, None] == segments[:, None, :]
    return (is_same & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)))[:, None]


def loss(
    leaves: Sequence[Array],
    rows: Int[Array, "B T1"],
    modes: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    config: TrainConfig,
    definition: ModelDef,
) -> Float[Array, ""]:
    """Mean cross entropy (nats) of each row's tokens after the first; runs inside `jax.shard_map`."""
    model = definition.merge([leaf.astype(definition.config.jax_dtype) for leaf in leaves])
    tokens, targets = rows[:, :-1], rows[:, 1:]
    heads = (*tokens.shape, 3, definition.config.num_heads, definition.config.head_dim)
    cos, sin = rotary_tables(jnp.arange(tokens.shape[1]), definition.config)
    is_visible = visible(tokens, modes)

    def attend(qkv: Array, act: Array) -> tuple[Array, tuple[Array, ...]]:
        q, k, v = jnp.moveaxis(qkv.reshape(heads), 2, 0)
        q, k = apply_rotary(q, k, (cos[None, :, None], sin[None, :, None]))
        attn = jax.nn.dot_product_attention(q, k, v, mask=is_visible, implementation="xla")
        attn = attn.reshape(len(act), -1)
        return jnp.concatenate([attn, act[:, attn.shape[1] :]], axis=1), ()

    def dropout(x: Array, layer: int) -> Array:
        if not config.dropout:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - config.dropout, x.shape)
        return jnp.where(keep, x / (1 - config.dropout), 0.0)

    # As products with one-hot rows: summing gradients into rows of the table is slow on GPUs and in no fixed order.
    one_hot = functools.partial(jax.nn.one_hot, num_classes=definition.config.vocab_size)
    tokens, targets = tokens.reshape(-1), targets.reshape(-1)
    x = dense(one_hot(tokens, dtype=definition.config.jax_dtype), model.embed.embedding[...].T, jnp.float32)
    x = dropout(x, 0)
    for layer, block in enumerate(model.blocks, start=1):
        y, _ = block(x, attend)
        x = x + dropout(y - x, layer)
    return jnp.mean(optax.softmax_cross_entropy(model.logits(x), one_hot(targets)))


@functools.partial(jax.jit, static_argnames=("config", "definition", "mesh"), donate_argnames=("state",))
def train_chunk(
    state: TrainState,
    stream: UInt16[Array, " tokens"],
    starts: Int[Array, " documents"],
    num_steps: Int[Array, ""],
    *,
    config: TrainConfig,
    definition: ModelDef,
    mesh: Mesh,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """``config.chunk`` steps and the loss of each. Rows are drawn on the device: the host only starts chunks.

    Args:
        state: donated.
        stream: the training documents, see `data`.
        starts: where in it a row may start: at the [EOS] before a document.
        num_steps: length of the schedule. Traced, so that it may change on the way.
    """
    leaf_specs: Any = definition.leaf_specs()
    loss_and_grads = jax.shard_map(
        jax.value_and_grad(functools.partial(loss, config=config, definition=definition)),
        mesh=mesh,
        in_specs=(leaf_specs, _SCALAR, _SCALAR, _SCALAR),
        out_specs=(_SCALAR, leaf_specs),
        check_vma=False,
    )
    optimizer = _optimizer(config, definition, num_steps)

    def step(state: TrainState, _: None) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        start_key, mode_key, dropout_key = jax.random.split(key, 3)
        first = jax.random.choice(start_key, starts, (config.batch,))
        rows = stream[first[:, None] + jnp.arange(config.row_len + 1)].astype(jnp.int32)
        modes = jax.random.choice(mode_key, 3, (config.batch,), p=jnp.array([0.4, 0.4, 0.2]))
        value, grads = loss_and_grads(state.leaves, rows, modes, dropout_key)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.leaves)
        leaves = optax.apply_updates(state.leaves, updates)
        # At first over all steps so far, or the random start would stay in the average for a long time.
        decay = jnp.minimum(config.ema_decay, state.step / (state.step + 10.0))
        averages = optax.incremental_update(leaves, state.averages, 1 - decay)
        return TrainState(state.step + 1, leaves, averages, optimizer_state), value

    state, losses = jax.lax.scan(step, state, length=config.chunk)
    # As it came in, or the second chunk would be compiled anew.
    return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, _SCALAR)), losses


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    directory: pathlib.Path,
    run_directory: pathlib.Path,
    *,
    max_minutes: float | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains on the streams in ``directory``; writes ``training.json`` and ``weights.npz`` into ``run_directory``.

    Kept are the averages at the step with the best validation loss, in ``model_config.dtype``. The same seed and number
    of steps give the same weights on the same machine.

    Args:
        max_minutes: if ``config.steps`` would take longer, judged by the second chunk (the first compiles), the
            schedule becomes as short as this asks; ``steps`` in ``training.json`` is what was run.
    """
    streams, facts = data.load(directory)
    if len(streams["train"]) <= config.row_len:
        raise InputError(f"row_len {config.row_len} is longer than the {len(streams['train'])} tokens of {directory}")
    mesh = make_mesh()
    # Measured in the dtype it is trained in; what is exported is measured again in f32.
    definition = model_def(dataclasses.replace(model_config, dtype=config.dtype))
    ends = np.flatnonzero(streams["train"] == data.EOS_ID)
    starts = jnp.asarray(ends[ends + config.row_len < len(streams["train"])])
    stream = jnp.asarray(streams["train"])
    state = initial_state(config, definition, mesh)
    history: list[dict[str, Any]] = []
    num_steps, step, best, best_step, kept = config.steps, 0, math.inf, 0, state.averages
    begin = time.perf_counter()
    while step < num_steps:
        state, losses = train_chunk(
            state, stream, starts, jnp.int32(num_steps), config=config, definition=definition, mesh=mesh
        )
        step += config.chunk
        mean_loss = float(losses.mean())
        if not math.isfinite(mean_loss):
            raise RuntimeError(f"the loss is {mean_loss} at step {step}")
        leaves = [leaf.astype(param.dtype) for leaf, param in zip(state.averages, definition.params, strict=True)]
        measured = data.measure(
            leaves, definition, mesh, streams["validation"], facts["validation"]["characters"], batch=256
        )
        record = {
            "step": step,
            "seconds": round(time.perf_counter() - begin, 2),
            "train_loss": round(mean_loss, 4),
            "validation_bits_per_char": round(measured.bits_per_char, 5),
            "validation_perplexity": round(measured.perplexity, 3),
        }
        log(json.dumps(record))
        history.append(record)
        if measured.bits_per_char < best:
            best, best_step, kept = measured.bits_per_char, step, [jnp.copy(leaf) for leaf in state.averages]
        if max_minutes is not None and len(history) == 2:
            seconds_left = 60 * max_minutes - history[1]["seconds"]
            chunks_left = int(seconds_left / (history[1]["seconds"] - history[0]["seconds"]))
            num_steps = min(num_steps, step + max(chunks_left, 0) * config.chunk)
    device = jax.devices()[0]
    result = {
        "model": model_config.to_hf_dict(),
        "settings": dataclasses.asdict(config) | {"steps": num_steps},
        "data": facts,
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "python": sys.version.split()[0]},
        "seconds": round(time.perf_counter() - begin, 1),
        "tokens_seen": num_steps * config.batch * config.row_len,
        "epochs": round(num_steps * config.batch * config.row_len / len(streams["train"]), 2),
        "best_step": best_step,
        "validation_bits_per_char": best,
        "history": history,
    }
    run_directory.mkdir(parents=True, exist_ok=True)
    arrays = {param.path: leaf for param, leaf in zip(definition.params, kept, strict=True)}
    export.write_run(run_directory, result, arrays, model_config)
    return result


app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

_Corpus = Annotated[pathlib.Path, typer.Option(help="Folder of the corpus' text files.")]
_Data = Annotated[pathlib.Path, typer.Option("--data", help="Folder of the token streams.")]
_Tokenizer = Annotated[pathlib.Path, typer.Option("--tokenizer", help="SentencePiece model.")]


@app.command("tokenizer")
def _tokenizer(
    corpus: _Corpus, out: Annotated[pathlib.Path, typer.Option(help="SentencePiece model to write.")]
) -> None:
    """Train the tokenizer on the training text."""
    out.write_bytes(data.train_tokenizer(corpus, DEMO.vocab_size))


@app.command("prepare")
def _prepare(
    corpus: _Corpus,
    out: Annotated[pathlib.Path, typer.Option(help="Folder for the token streams.")],
    tokenizer: _Tokenizer = DIRECTORY / "tokenizer.model",
) -> None:
    """Tokenize the corpus: all that training and export read."""
    print(json.dumps(data.prepare(corpus, tokenizer, out), indent=1))


@app.command("model")
def _model(
    directory: _Data,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of this run.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = TrainConfig.steps,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = TrainConfig.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = TrainConfig.weight_decay,
    dropout: Annotated[float, typer.Option(help="Rate.")] = TrainConfig.dropout,
    seed: Annotated[int, typer.Option(help="Of weights, rows and dropout.")] = TrainConfig.seed,
    max_minutes: Annotated[float | None, typer.Option(help="Fewer steps if these would take longer.")] = None,
) -> None:
    """Train the model."""
    config = TrainConfig(
        steps=steps, learning_rate=learning_rate, weight_decay=weight_decay, dropout=dropout, seed=seed
    )
    train(DEMO, config, directory, out, max_minutes=max_minutes, log=functools.partial(print, flush=True))


@app.command("export")
def _export(
    runs: Annotated[list[pathlib.Path], typer.Argument(help="Folders of runs; the best on validation is taken.")],
    directory: _Data,
    out: Annotated[pathlib.Path, typer.Option(help="Folder to write, in Hugging Face layout.")],
    baseline: Annotated[pathlib.Path | None, typer.Option(help="JSON of benchmarks/char_ngram.py.")] = None,
    tokenizer: _Tokenizer = DIRECTORY / "tokenizer.model",
) -> None:
    """Measure the best run on the held-out lines and write it with its model card."""
    print(json.dumps(export.export(runs, directory, out, tokenizer, baseline)["heldout"], indent=1))


if __name__ == "__main__":
    runtime.configure()
    try:
        app()
    except InputError as error:
        if sys.stderr is not None:  # the shell closed it: `print` would write to stdout
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
