"""From the corpus' lines to token streams, and what a model makes of lines it has not seen.

A document is one line of the corpus. A stream is ``[EOS] document [EOS] document [EOS] ...``: every document stands
between two [EOS], so that [EOS] is also what the first token of a document is predicted from.
"""

import dataclasses
import hashlib
import io
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
from jax.sharding import Mesh
from jaxtyping import Array, UInt16

from kogpt_jax import decoding
from kogpt_jax.errors import InputError
from kogpt_jax.json_files import read_json_object
from kogpt_jax.model import ModelDef
from kogpt_jax.packing import pack_whole

TRAIN_FILES = ("reviews.train.txt", "constitution.txt")
HELDOUT_FILE = "reviews.heldout.txt"
EOS_ID = 1
SPLITS = ("train", "validation", "heldout")

# 46 KB of statute beside 34 MB of reviews would be seen too seldom to leave a second style.
_CONSTITUTION_COPIES = 4
# Settings and the best step are chosen on this share of the reviews: the held-out lines are looked at only once.
_VALIDATION_EVERY = 160

Stream = UInt16[np.ndarray, "tokens"]


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a corpus file, without surrounding space and without empty ones.

    Raises:
        InputError: the file is missing or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"corpus file does not exist: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from error
    # Not splitlines(): that also splits at characters that stand inside a line, such as U+2028.
    return [line for line in map(str.strip, text.split("\n")) if line]


def train_lines(corpus: pathlib.Path) -> Iterator[str]:
    """All that may be learnt from: the reviews, then the constitution several times over."""
    reviews, constitution = (read_lines(corpus / name) for name in TRAIN_FILES)
    yield from reviews
    for _ in range(_CONSTITUTION_COPIES):
        yield from constitution


def train_tokenizer(corpus: pathlib.Path, vocab_size: int) -> bytes:
    """A SentencePiece unigram model with KoGPT's five special tokens as ids 0 to 4, then the 256 bytes, then pieces.

    The text is taken as it is (no normalisation, no space put in front), so that decoding gives back exactly what was
    encoded and the texts of consecutive pieces join. What the vocabulary lacks is spelt in UTF-8 bytes: nothing encodes
    to [UNK]. Training is deterministic for a version of SentencePiece.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=train_lines(corpus),  # not `input=`: the model file would name the paths
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=0.9995,
        split_digits=True,
        bos_id=0,
        eos_id=EOS_ID,
        unk_id=2,
        pad_id=3,
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        pad_piece="[PAD]",
        control_symbols=["[MASK]"],
        num_threads=2,
        minloglevel=1,
    )
    return model.getvalue()


def prepare(corpus: pathlib.Path, tokenizer_file: pathlib.Path, directory: pathlib.Path) -> dict[str, Any]:
    """Writes ``train.npy``, ``validation.npy`` and ``heldout.npy`` (streams) and ``data.json`` into ``directory``.

    Returns:
        What ``data.json`` holds: tokens, documents and characters of each split, and digests of what it was made from.
    """
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    lines = list(train_lines(corpus))
    num_reviews = len(read_lines(corpus / TRAIN_FILES[0]))
    is_validation = [index % _VALIDATION_EVERY == 0 and index < num_reviews for index in range(len(lines))]
    splits = {
        "train": [line for line, held in zip(lines, is_validation, strict=True) if not held],
        "validation": [line for line, held in zip(lines, is_validation, strict=True) if held],
        "heldout": read_lines(corpus / HELDOUT_FILE),
    }
    files = (*(corpus / name for name in (*TRAIN_FILES, HELDOUT_FILE)), tokenizer_file)
    facts: dict[str, Any] = {"sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}
    directory.mkdir(parents=True, exist_ok=True)
    for name, documents in splits.items():
        stream = _stream(tokenizer.encode(documents))
        np.save(directory / f"{name}.npy", stream)
        # Each line's end counts as a character, as its [EOS] counts among the bits.
        num_chars = sum(len(document) + 1 for document in documents)
        facts[name] = {"documents": len(documents), "tokens": len(stream), "characters": num_chars}
    (directory / "data.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def load(directory: pathlib.Path) -> tuple[dict[str, Stream], dict[str, Any]]:
    """The streams by split and the facts that `prepare` wrote.

    Raises:
        InputError: a file is missing, or ``data.json`` is no JSON object.
    """
    files = [directory / f"{name}.npy" for name in SPLITS]
    for file in (*files, directory / "data.json"):
        if not file.is_file():
            raise InputError(f"{file} is missing: run `prepare` first")
    facts = read_json_object(directory / "data.json")
    return {name: np.load(file) for name, file in zip(SPLITS, files, strict=True)}, facts


@dataclasses.dataclass(frozen=True)
class Measured:
    """How well a model predicts a split, each document from its start."""

    documents: int
    tokens: int  # predicted ones: all of the documents and an [EOS] after each
    characters: int  # line ends included
    bits_per_char: float
    perplexity: float  # a token


def measure(
    leaves: Sequence[Array], definition: ModelDef, mesh: Mesh, stream: Stream, num_chars: int, *, batch: int = 64
) -> Measured:
    """Bits per character: ``sum(-log2 p)`` over the tokens of each document and its [EOS], by the number of characters.

    Each document is a row of its own and only [EOS] stands before it, from which its first token is predicted; the same
    holds between documents of a stream.

    Raises:
        InputError: a document is longer than the model's context.
    """
    ends = np.flatnonzero(stream == EOS_ID)
    # [EOS] d0 d1 d2 [EOS] d3 ... -> rows [EOS] d0 d1 d2 [EOS], of which all but the first token are predicted.
    rows = [stream[start : end + 1] for start, end in zip(ends[:-1], ends[1:], strict=True)]
    rows.sort(key=len)
    max_len = definition.config.max_len
    if len(rows[-1]) > max_len:
        raise InputError(f"a document of {len(rows[-1])} tokens is longer than the model's context of {max_len}")
    total = 0.0
    for first in range(0, len(rows), batch):
        group = [row.tolist() for row in rows[first : first + batch]]
        group += [[]] * (batch - len(group))  # or the last one compiles anew
        chunks = pack_whole(group, num_shards=1, num_chunks=1)
        logprobs = np.asarray(decoding.score(leaves, chunks, definition=definition, mesh=mesh), np.float64)
        for begin, row in zip(chunks.begins[0], group, strict=True):
            total -= float(logprobs[0, begin : begin + len(row) - 1].sum())
    num_tokens = len(stream) - 1
    return Measured(
        documents=len(rows),
        tokens=num_tokens,
        characters=num_chars,
        bits_per_char=total / math.log(2) / num_chars,
        perplexity=math.exp(total / num_tokens),
    )


def _stream(documents: Sequence[Sequence[int]]) -> Stream:
    ids = [EOS_ID]
    for document in documents:
        ids.extend(document)
        ids.append(EOS_ID)
    return np.asarray(ids, np.uint16)
