"""Makes the demo model: a SentencePiece tokenizer and a small GPT-J, from a folder of Korean text (extra ``train``).

    python -m kogpt_jax.demo.train tokenizer --corpus CORPUS --out DATA
    python -m kogpt_jax.demo.train prepare --corpus CORPUS --data DATA
    python -m kogpt_jax.demo.train model --data DATA --out RUN

CORPUS holds reviews.train.txt and reviews.heldout.txt (one document a line) and constitution.txt. The first two commands
need a CPU for a few minutes; the last, which needs DATA only, a few minutes of one GPU.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kogpt_jax import checkpoint
from kogpt_jax.config import DEMO, ModelConfig
from kogpt_jax.model import model_def, random_leaves
from kogpt_jax.sharding import make_mesh
from kogpt_jax.tokenizer import load_tokenizer
from kogpt_jax.weight_files import write_json

_TOKENIZER_FILE = "tokenizer.model"
_CONSTITUTION_REPEATS = 4  # 46 KB of another style beside 34 MB of reviews

_EOS_ID = 1
_MASK_ID = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained: AdamW (Loshchilov and Hutter 2019), linear warm-up, cosine decay, averaged weights."""

    steps: int = 4000
    batch_rows: int = 256
    row_len: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    # Input tokens replaced by [MASK]: the text is small, and a model that cannot rely on each word overfits later.
    token_dropout: float = 0.1
    seed: int = 0


def train_documents(corpus: pathlib.Path) -> Iterator[str]:
    """The training text, a document at a time."""
    yield from _lines(corpus / "reviews.train.txt")
    for _ in range(_CONSTITUTION_REPEATS):
        yield from _lines(corpus / "constitution.txt")


def heldout_documents(corpus: pathlib.Path) -> Iterator[str]:
    """Text that nothing is trained on."""
    yield from _lines(corpus / "reviews.heldout.txt")


def _lines(path: pathlib.Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if text := line.strip():
                yield text


def train_tokenizer(corpus: pathlib.Path, out: pathlib.Path) -> None:
    """A unigram SentencePiece model with KoGPT's five special tokens as ids 0 to 4.

    Text comes back as it was: no normalisation, no folding of white space, and bytes for what the vocabulary lacks.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=train_documents(corpus),
        model_writer=model,
        model_type="unigram",
        vocab_size=DEMO.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=0.9995,
        split_digits=True,
        bos_id=0,
        eos_id=_EOS_ID,
        unk_id=2,
        pad_id=3,
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        pad_piece="[PAD]",
        control_symbols=["[MASK]"],
        minloglevel=1,
    )
    (out / _TOKENIZER_FILE).write_bytes(model.getvalue())


def prepare(corpus: pathlib.Path, data: pathlib.Path) -> None:
    """Token ids of the corpus, each document followed by [EOS], as ``train.npy`` and ``heldout.npy``, uint16."""
    tokenizer = load_tokenizer(data / _TOKENIZER_FILE)
    for name, documents in (("train", train_documents), ("heldout", heldout_documents)):
        num_chars = 0
        stream: list[np.ndarray] = []
        for text in documents(corpus):
            num_chars += len(text) + 1
            stream.append(np.array([*tokenizer.encode(text), _EOS_ID], np.uint16))
        tokens = np.concatenate(stream)
        np.save(data / f"{name}.npy", tokens)
        write_json(data / f"{name}.json", {"documents": len(stream), "tokens": len(tokens), "characters": num_chars})


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out documents as rows: [EOS] (the end of the document before), the document, [EOS], then padding.

    So each document is read from its start, and its first token is predicted from what stands before it in training.
    """

    rows: Int[np.ndarray, "documents T"]
    lengths: Int[np.ndarray, " documents"]
    num_chars: int

    @classmethod
    def load(cls, data: pathlib.Path, max_len: int) -> "HeldOut":
        """Reads what ``prepare`` wrote. Documents longer than ``max_len`` - 1 tokens are refused: none may be cut."""
        tokens = np.load(data / "heldout.npy").astype(np.int32)
        documents = np.split(tokens, np.flatnonzero(tokens == _EOS_ID) + 1)[:-1]
        lengths = np.array([len(document) + 1 for document in documents])
        if lengths.max() > max_len:
            raise ValueError(f"a held-out document has {lengths.max()} tokens, more than {max_len}")
        rows = np.full((len(documents), int(-(-lengths.max() // 16) * 16)), _EOS_ID, np.int32)
        for row, document in zip(rows, documents, strict=True):
            row[1 : len(document) + 1] = document
        num_chars = json.loads((data / "heldout.json").read_text())["characters"]
        return cls(rows, lengths, num_chars)


def _losses(leaves: Sequence[Array], tokens: Int[Array, "B T"], targets: Int[Array, "B T"], config: ModelConfig) -> Array:
    """Cross entropy in nats of each target, [B, T] f32."""
    definition = model_def(config)

    def local(leaves: Sequence[Array], tokens: Array, targets: Array) -> Array:
        model = definition.merge(leaves)
        logits = model.logits(model.hidden(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    rows = PartitionSpec()
    return jax.shard_map(
        local, mesh=make_mesh(), in_specs=(definition.leaf_specs(), rows, rows), out_specs=rows, check_vma=False
    )(list(leaves), tokens, targets)


def evaluate(leaves: Sequence[Array], config: ModelConfig, heldout: HeldOut, *, batch_rows: int = 200) -> dict[str, float]:
    """Held-out loss in nats a token, perplexity, and bits a character (a document's end counts as one character)."""
    nats, num_tokens = 0.0, 0
    run = jax.jit(_losses, static_argnames="config")
    for start in range(0, len(heldout.rows), batch_rows):
        rows, lengths = heldout.rows[start : start + batch_rows], heldout.lengths[start : start + batch_rows]
        losses = np.asarray(run(leaves, rows[:, :-1], rows[:, 1:], config=config), np.float64)
        is_counted = np.arange(rows.shape[1] - 1) < (lengths - 1)[:, None]
        nats += losses[is_counted].sum()
        num_tokens += int(is_counted.sum())
    loss = nats / num_tokens
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_character": nats / math.log(2) / heldout.num_chars}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaves", "averaged", "optimizer", "step"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _TrainState:
    leaves: list[Float[Array, "..."]]  # f32
    averaged: list[Float[Array, "..."]]  # f32, exponential moving average: what is kept in the end
    optimizer: optax.OptState
    step: Int[Array, ""]


def _optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, training.warmup_steps, training.steps, end_value=training.learning_rate / 100
    )
    return optax.chain(
        optax.clip_by_global_norm(training.grad_clip),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.98,
            weight_decay=training.weight_decay,
            mask=lambda leaves: [leaf.ndim > 1 for leaf in leaves],
        ),
    )


def _batch(key: Array, stream: Int[Array, " tokens"], starts: Int[Array, " documents"], training: TrainingConfig) -> Array:
    """Rows of ``row_len`` + 1 tokens: half begin with a document, as a prompt does; a quarter with the [EOS] before one,
    as scoring does; a quarter anywhere."""
    place_key, document_key = jax.random.split(key)
    rows = training.batch_rows
    document_starts = starts[jax.random.randint(document_key, (rows,), 0, len(starts))]
    anywhere = jax.random.randint(place_key, (rows,), 0, len(stream))
    begin = jnp.where(jnp.arange(rows) < rows // 2, document_starts, document_starts - 1)
    begin = jnp.where(jnp.arange(rows) < 3 * rows // 4, begin, anywhere)
    begin = jnp.clip(begin, 0, len(stream) - training.row_len - 1)
    return stream[begin[:, None] + jnp.arange(training.row_len + 1)].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "training", "num_steps"), donate_argnames="state")
def _train_steps(
    state: _TrainState, stream: Array, starts: Array, *, config: ModelConfig, training: TrainingConfig, num_steps: int
) -> tuple[_TrainState, Array]:
    """Several steps in one program, so that the host is never in the way. Returns the mean loss."""
    optimizer = _optimizer(training)

    def step(_: Array, carry: tuple[_TrainState, Array]) -> tuple[_TrainState, Array]:
        state, total = carry
        batch_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), state.step))
        rows = _batch(batch_key, stream, starts, training)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        is_dropped = jax.random.bernoulli(dropout_key, training.token_dropout, tokens.shape)
        tokens = jnp.where(is_dropped, _MASK_ID, tokens)

        def loss_of(leaves: list[Array]) -> Array:
            cast = [leaf.astype(config.jax_dtype) for leaf in leaves]
            return jnp.mean(_losses(cast, tokens, targets, config))

        loss, grads = jax.value_and_grad(loss_of)(state.leaves)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.leaves)
        leaves = optax.apply_updates(state.leaves, updates)
        averaged = optax.incremental_update(leaves, state.averaged, 1 - training.ema_decay)
        return _TrainState(leaves, averaged, optimizer_state, state.step + 1), total + loss

    state, total = jax.lax.fori_loop(0, num_steps, step, (state, jnp.float32(0)))
    return state, total / num_steps


def train_model(
    data: pathlib.Path, out: pathlib.Path, config: ModelConfig, training: TrainingConfig, *, steps_per_log: int = 250
) -> None:
    """Trains, writes the averaged weights in fp16 as a Hugging Face directory of two shards, and ``training.json``."""
    compute = dataclasses.replace(config, dtype="bf16" if jax.default_backend() == "gpu" else "fp32")
    stored = dataclasses.replace(config, dtype="fp16")
    stream = np.load(data / "train.npy").astype(np.int32)
    starts = np.concatenate([[0], np.flatnonzero(stream == _EOS_ID)[:-1] + 1]).astype(np.int32)
    heldout = HeldOut.load(data, config.max_len)
    masters = random_leaves(dataclasses.replace(config, dtype="fp32"), make_mesh(), seed=training.seed)
    state = _TrainState(
        masters, [jnp.copy(leaf) for leaf in masters], _optimizer(training).init(masters), jnp.int32(0)
    )
    stream_on_device, starts_on_device = jnp.asarray(stream), jnp.asarray(starts)
    log = []
    begin = time.monotonic()
    for done in range(0, training.steps, steps_per_log):
        num_steps = min(steps_per_log, training.steps - done)
        state, loss = _train_steps(
            state, stream_on_device, starts_on_device, config=compute, training=training, num_steps=num_steps
        )
        cast = [leaf.astype(compute.jax_dtype) for leaf in state.averaged]
        entry = {"step": done + num_steps, "seconds": round(time.monotonic() - begin, 1), "train_loss": float(loss)}
        log.append({**entry, **{f"heldout_{name}": value for name, value in evaluate(cast, compute, heldout).items()}})
        print(json.dumps(log[-1]), flush=True)
    leaves = [leaf.astype(stored.jax_dtype) for leaf in state.averaged]
    run = {
        "training": dataclasses.asdict(training),
        "model": dataclasses.asdict(stored),
        "parameters": sum(leaf.size for leaf in leaves),
        "train": json.loads((data / "train.json").read_text()),
        "heldout": json.loads((data / "heldout.json").read_text()),
        "tokens_seen": training.steps * training.batch_rows * training.row_len,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "final": evaluate([leaf.astype(jnp.float32) for leaf in leaves], dataclasses.replace(config, dtype="fp32"), heldout),
        "log": log,
    }
    # Two shards with an index, so that the shipped files pass through the loader's general case.
    num_bytes = sum(leaf.nbytes for leaf in leaves)
    checkpoint.save_pretrained(
        out, stored, leaves, max_shard_bytes=int(num_bytes * 0.55), tokenizer_files=[data / _TOKENIZER_FILE]
    )
    write_json(out / "training.json", run)
    print(json.dumps(run["final"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line that the module's docstring shows."""
    parser = argparse.ArgumentParser(prog="python -m kogpt_jax.demo.train")
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer = commands.add_parser("tokenizer", help="train the tokenizer")
    tokenizer.add_argument("--corpus", type=pathlib.Path, required=True)
    tokenizer.add_argument("--out", type=pathlib.Path, required=True)
    ids = commands.add_parser("prepare", help="turn the corpus into token ids")
    ids.add_argument("--corpus", type=pathlib.Path, required=True)
    ids.add_argument("--data", type=pathlib.Path, required=True)
    model = commands.add_parser("model", help="train the model")
    model.add_argument("--data", type=pathlib.Path, required=True)
    model.add_argument("--out", type=pathlib.Path, required=True)
    for field in dataclasses.fields(TrainingConfig):
        flag = "--" + field.name.replace("_", "-")
        model.add_argument(flag, type=type(field.default), default=field.default)
    chosen = parser.parse_args(arguments)
    if chosen.command == "tokenizer":
        train_tokenizer(chosen.corpus, chosen.out)
    elif chosen.command == "prepare":
        prepare(chosen.corpus, chosen.data)
    else:
        names = (field.name for field in dataclasses.fields(TrainingConfig))
        train_model(chosen.data, chosen.out, DEMO, TrainingConfig(**{name: getattr(chosen, name) for name in names}))


if __name__ == "__main__":
    main()
