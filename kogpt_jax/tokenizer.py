"""Text to token ids and back: SentencePiece ``.model`` and Hugging Face ``tokenizer.json`` behind one face.

Decoding is a small state machine over pieces: a token is either text or raw bytes, and the bytes of neighbours together
form UTF-8 characters. ``Tokenizer.decode`` and ``IncrementalDecoder`` run the same machine, so streamed text and
one-shot text cannot differ, and a token costs the same however long the text is. What the machine needs to know of a
tokenizer is read when it is loaded; a decoder that cannot be described so is refused by name.

A character here is a Unicode code point: an emoji of several code points may arrive in several parts.
"""

import abc
import codecs
import json
import operator
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int

from kogpt_jax.errors import InputError, one_line
from kogpt_jax.json_files import read_json_object

# KoGPT's names for the five roles, tried whenever a checkpoint's own files are silent: KoGPT's users pass them by hand.
KOGPT_SPECIAL_TOKENS = {"bos": "[BOS]", "eos": "[EOS]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}

# Files beside a tokenizer that name its special tokens; the first to speak wins.
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_COMPANION_FILES = (*_NAMING_FILES, "added_tokens.json")

TokenIds = Iterable[int] | Int[np.ndarray, "T"]

_SPACE = "\u2581"  # SentencePiece writes a space as this character

_Piece = str | bytes  # text that stands alone, or bytes that join with those of the neighbouring tokens

_EACH_BYTE = "kogpt_jax.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: one U+FFFD for each broken byte, as SentencePiece writes it."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Tokenizer(abc.ABC):
    """What both backends share; made by ``load_tokenizer``.

    Attributes:
        path: the file it was loaded from.
        files: that file and the companions that lie beside it, what a copy of the checkpoint must hold.
        vocab_size: highest id + 1. A model's vocabulary may be larger (padded rows), then the ids above have no text.
        bos_id, eos_id, unk_id, pad_id, mask_id: ids of the special tokens, None where the vocabulary has none.
        special_ids: every id that is control, not text; the ids above are among them.
    """

    vocab_size: int
    special_ids: frozenset[int]
    _fallback_id: int | None  # what encoding falls back to for text that the vocabulary lacks
    _utf8_errors: str  # how broken UTF-8 comes out: "replace" (U+FFFD per maximal subpart) or _EACH_BYTE

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        companions = (path.parent / name for name in _COMPANION_FILES)
        self.files = (path, *(companion for companion in companions if companion.is_file()))
        self._pieces: dict[int, _Piece] = {}

    def _set_roles(self, ids: Mapping[str, int]) -> None:
        self.bos_id, self.eos_id = ids.get("bos"), ids.get("eos")
        self.unk_id, self.pad_id, self.mask_id = ids.get("unk"), ids.get("pad"), ids.get("mask")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token around them.

        Text never turns into a special token: "[EOS]" in a prompt is five ordinary characters. Where a vocabulary has
        no other reading of them (a special token that is also an ordinary or user-defined piece) the text is refused.

        Raises:
            InputError: not a str, a lone surrogate, or text that can only be read as a special token.
        """
        if not isinstance(text, str):
            raise InputError(f"text must be a str, got {type(text).__name__} {text!r:.80}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            char = ord(text[error.start])
            raise InputError(f"text holds the lone surrogate U+{char:04X} at character {error.start}") from error
        ids = self._encode(text)
        for token_id in self.special_ids.intersection(ids) - {self._fallback_id}:
            raise InputError(f"text holds {self._name(token_id)!r}, which can only be read as a special token")
        return ids

    def decode(self, token_ids: TokenIds, skip_special: bool = True) -> str:
        """Text of token ids; broken UTF-8 comes out as U+FFFD.

        Args:
            token_ids: any sequence of ids of this vocabulary.
            skip_special: leave special tokens out; otherwise they stand in the text by their names. SentencePiece's
                unknown token is not left out: it reads as the model's unknown mark, for it hides text that was there.

        Raises:
            InputError: an id that is not an integer or not in the vocabulary.
        """
        decoder = IncrementalDecoder(self, skip_special=skip_special)
        return decoder.push(token_ids) + decoder.flush()

    def decode_continuation(self, prompt_ids: TokenIds, new_ids: TokenIds, skip_special: bool = True) -> str:
        """Text that ``new_ids`` add after ``prompt_ids``; what ``IncrementalDecoder`` streams, in one go."""
        decoder = IncrementalDecoder(self, prefix_ids=prompt_ids, skip_special=skip_special)
        return decoder.push(new_ids) + decoder.flush()

    def __contains__(self, token_id: int) -> bool:
        """Whether an id has a token. A model's vocabulary may hold ids without: gaps, rows padded for a device."""
        if token_id not in self._pieces and 0 <= token_id < self.vocab_size:
            piece = self._piece(token_id)
            if piece is not None:
                self._pieces[token_id] = piece
        return token_id in self._pieces

    def _checked(self, token_ids: TokenIds) -> list[int]:
        """The ids as Python integers, each of them known to have a text."""
        ids = []
        for value in token_ids:
            try:
                token_id = operator.index(value)
            except TypeError:
                raise InputError(f"token id must be an integer, got {value!r}") from None
            if token_id not in self:
                raise InputError(f"token id {token_id} is not in the vocabulary of {self.path}")
            ids.append(token_id)
        return ids

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _name(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""

    @abc.abstractmethod
    def _piece(self, token_id: int) -> _Piece | None:
        """What a token adds to a text that has begun; None for an id without a token."""

    @abc.abstractmethod
    def _first_piece(self, token_id: int) -> tuple[_Piece, bool]:
        """What a token adds at the very start, and whether the start lasts on for the next token."""

    @abc.abstractmethod
    def _special_piece(self, token_id: int, skip: bool) -> _Piece | None:
        """What a special token adds; None: as any other token. Text, even if empty, ends a run of bytes."""


class IncrementalDecoder:
    """Turns a stream of token ids into text, character by whole character.

    What pushes and flush return, joined, is ``tokenizer.decode`` of all ids, however they are split into pushes.
    Nothing is taken back later; at most the 3 bytes of an unfinished character are held.

    ``prefix_ids`` (a prompt) come before and give no text of their own: the stream is what follows them, so that
    ``decode(prefix) + stream == decode(prefix + ids)``. Only where the prefix ends inside a character, that character
    belongs to the stream: whole, if the next ids finish it, else as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, prefix_ids: TokenIds = (), *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = True
        self._pending = bytearray()  # an unfinished UTF-8 character
        self.push(prefix_ids)

    def push(self, token_ids: TokenIds) -> str:
        """The text that these ids complete, possibly empty.

        Raises:
            InputError: an id that is not an integer or not in the vocabulary; then none of the ids has been taken.
        """
        tokenizer, pending = self._tokenizer, self._pending
        parts: list[str] = []
        for token_id in tokenizer._checked(token_ids):
            is_plain = not self._at_start and token_id not in tokenizer.special_ids
            piece = tokenizer._pieces[token_id] if is_plain else self._delicate_piece(token_id)
            if isinstance(piece, bytes):
                pending += piece
            else:
                if pending:
                    parts.append(self._take(final=True))
                parts.append(piece)
        if pending:
            parts.append(self._take(final=False))
        return "".join(parts)

    def flush(self) -> str:
        """The rest: U+FFFD for a character that never was finished. Call it once, after the last push."""
        return self._take(final=True)

    def _delicate_piece(self, token_id: int) -> _Piece:
        """The piece of a special token or of one at the start."""
        if token_id in self._tokenizer.special_ids:
            piece = self._tokenizer._special_piece(token_id, self._skip_special)
            if piece is not None:
                return piece
        if self._at_start:
            piece, self._at_start = self._tokenizer._first_piece(token_id)
            return piece
        return self._tokenizer._pieces[token_id]

    def _take(self, *, final: bool) -> str:
        """Takes the whole characters from the pending bytes; with ``final`` the unfinished one too."""
        text, used = codecs.utf_8_decode(self._pending, self._tokenizer._utf8_errors, final)
        del self._pending[:used]
        return text


class _SentencePieceTokenizer(Tokenizer):
    """Agrees with ``SentencePieceProcessor.decode`` on every id sequence.

    Except that a user-defined piece in one of the five roles is skipped too, and denormalisation rules are not applied.
    """

    _utf8_errors = _EACH_BYTE

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        raw = _read_bytes(path)
        try:
            if not raw:  # the library accepts it, prints, and answers 0 to everything
                raise RuntimeError("the file is empty")
            self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise InputError(f"{path} is not a SentencePiece model: {one_line(error)}") from error
        self.vocab_size = processor.vocab_size()
        self._fallback_id = unknown_id = processor.unk_id()
        self._unknown_text: str = processor.decode([unknown_id])

        own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": unknown_id, "pad": processor.pad_id()}
        roles = {role: token_id for role, token_id in own.items() if token_id >= 0}
        roles |= _find_roles(self.files, self._id_of)
        self._set_roles(roles)
        control_ids = {token_id for token_id in range(self.vocab_size) if processor.is_control(token_id)}
        self.special_ids = frozenset(control_ids | set(roles.values()))

        # Training flags decide what becomes of spaces at the start of a decoded text: all kept, one dropped (which
        # encoding had put there) or all dropped. The library does not tell the flags, so the model is tried.
        space_id = self._id_of(_SPACE)
        if space_id is None:
            space_id = next((i for i in range(self.vocab_size) if processor.id_to_piece(i).startswith(_SPACE)), None)
        texts = ["", ""] if space_id is None else [processor.decode([space_id] * count) for count in (1, 2)]
        self._drops_space = not texts[0].startswith(" ")
        self._drops_all_spaces = not texts[1]

    def _id_of(self, name: str) -> int | None:
        token_id = self._processor.piece_to_id(name)  # the unknown id for what is not there
        return token_id if self._name(token_id) == name else None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def _name(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def _piece(self, token_id: int) -> _Piece:
        if token_id == self._fallback_id:
            return self._unknown_text
        name = self._name(token_id)
        return bytes([int(name[3:5], 16)]) if self._processor.is_byte(token_id) else name.replace(_SPACE, " ")

    def _first_piece(self, token_id: int) -> tuple[_Piece, bool]:
        piece = self._pieces[token_id]
        if self._drops_space and token_id != self._fallback_id and self._name(token_id).startswith(_SPACE):
            return piece[1:], self._drops_all_spaces and len(piece) == 1
        return piece, False

    def _special_piece(self, token_id: int, skip: bool) -> _Piece | None:
        if token_id == self._fallback_id:
            return None
        return "" if skip else self._name(token_id)


class _HuggingFaceTokenizer(Tokenizer):
    """Agrees with ``tokenizers.Tokenizer.decode`` on every id sequence, with one exception.

    A ``ByteFallback`` decoder gives up a whole run of byte tokens if one byte in it is broken, known only after the
    run: here whole characters of the run are kept and only broken bytes become U+FFFD, as SentencePiece does it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        spec = read_json_object(path)
        try:
            self._tokenizer = tokenizer = tokenizers.Tokenizer.from_buffer(_read_bytes(path))
        except ValueError as error:
            raise InputError(f"{path} is not a Hugging Face tokenizer: {one_line(error)}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # that is: special tokens in a text are encoded as the text they are
        vocabulary = tokenizer.get_vocab()
        if not vocabulary:
            raise InputError(f"{path}: the vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1

        self._fallback_id = _own_unknown(spec["model"], vocabulary)
        roles = {} if self._fallback_id is None else {"unk": self._fallback_id}
        roles |= _find_roles(self.files, vocabulary.get)
        self._set_roles(roles)
        # KoGPT's special tokens may be ordinary entries that only become special by name.
        names = [self._name(token_id) for token_id in roles.values()]
        tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

        self._piece_of, self._first_piece_of, self._utf8_errors = _compile_decoder(spec.get("decoder"), tokenizer, path)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _name(self, token_id: int) -> str:
        name = self._tokenizer.id_to_token(token_id)
        assert name is not None
        return name

    def _piece(self, token_id: int) -> _Piece | None:
        token = self._tokenizer.id_to_token(token_id)  # None in a gap between the model's ids and the added ones
        return None if token is None else self._piece_of(token)

    def _first_piece(self, token_id: int) -> tuple[_Piece, bool]:
        return self._first_piece_of(self._name(token_id)), False

    def _special_piece(self, token_id: int, skip: bool) -> _Piece | None:
        return b"" if skip else None  # as if the token were not there: bytes on both sides of it join


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Loads a tokenizer from a ``.model`` or ``.json`` file, or from a directory that holds one (``find_tokenizer``).

    Special tokens are looked up under the names that ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it
    give, else under KoGPT's names; what is not found so is what a SentencePiece model itself declares, or None.

    Raises:
        InputError: nothing there, a broken file, or a tokenizer that cannot be decoded in a stream.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"tokenizer does not exist: {path}")
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise InputError(f"no tokenizer in {path}: expected tokenizer.json or a SentencePiece *.model")
        path = found
    if path.suffix == ".json":
        return _HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return _SentencePieceTokenizer(path)
    raise InputError(f"tokenizer must be a .json or .model file, got {path}")


def find_tokenizer(directory: str | pathlib.Path) -> pathlib.Path | None:
    """The tokenizer file of a checkpoint: ``tokenizer.json``, else its only ``*.model``; None if it has neither.

    Raises:
        InputError: several ``*.model`` files and no ``tokenizer.json``.
    """
    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").is_file():
        return directory / "tokenizer.json"
    models = sorted(file for file in directory.glob("*.model") if file.is_file())
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise InputError(f"several tokenizers in {directory}: {names}; name one of them")
    return models[0] if models else None


def _find_roles(files: Iterable[pathlib.Path], id_of: Callable[[str], int | None]) -> dict[str, int]:
    """Ids of the roles by the names that the files give, else by KoGPT's names; only those in the vocabulary."""
    names = dict(KOGPT_SPECIAL_TOKENS)
    for file in reversed([file for file in files if file.name in _NAMING_FILES]):  # the first has the last word
        names |= _named_roles(file)
    ids = {role: id_of(name) for role, name in names.items()}
    return {role: token_id for role, token_id in ids.items() if token_id is not None}


def _named_roles(file: pathlib.Path) -> dict[str, str]:
    """What ``bos_token`` and its like say in a file: a string or an object with a string ``content``."""
    names = {}
    spec = read_json_object(file)
    for role in KOGPT_SPECIAL_TOKENS:
        value = spec.get(f"{role}_token")
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            names[role] = name
        elif value is not None:  # null is silence
            raise InputError(f"{file}: {role}_token must be a string or hold a string content, got {value!r:.80}")
    return names


def _own_unknown(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """The token that the model itself falls back to: Unigram gives its id, the others its name."""
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else vocabulary.get(name)


def _compile_decoder(
    spec: Mapping[str, Any] | None, tokenizer: tokenizers.Tokenizer, path: pathlib.Path
) -> tuple[Callable[[str], _Piece], Callable[[str], _Piece], str]:
    """Reads the decoder of a ``tokenizer.json`` as rules for one token at a time.

    Returns:
        What a token adds inside a text, what it adds as the first one, and how broken UTF-8 comes out.

    Raises:
        InputError: a decoder for which one token's text depends on more than whether it is the first.
    """
    steps = _flatten(spec)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_piece, _byte_level_piece, "replace"
    if not kinds:  # the library joins tokens with spaces
        return lambda token: " " + token, lambda token: token, "replace"
    if kinds in (["Metaspace"], ["WordPiece"]):
        decode = tokenizer.decoder.decode
        return lambda token: decode(["a", token])[1:], lambda token: decode([token]), "replace"

    # What SentencePiece models are converted to: texts replaced, bytes, all joined, then the first space dropped.
    replacements = []
    while steps and steps[0].get("type") == "Replace" and "String" in steps[0]["pattern"]:
        replacements.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        steps = steps[1:]
    kinds = [step.get("type") for step in steps]
    has_bytes = kinds[:1] == ["ByteFallback"]
    drops_space = kinds[-2:] == ["Fuse", "Strip"]
    known = ["ByteFallback"] * has_bytes + ["Fuse"] * ("Fuse" in kinds) + ["Strip"] * drops_space
    strip_is_known = not drops_space or (steps[-1]["content"], steps[-1]["start"], steps[-1]["stop"]) == (" ", 1, 0)
    if kinds != known or not strip_is_known:
        raise InputError(f"{path}: decoder {json.dumps(spec, ensure_ascii=False):.200} is not supported")

    def piece(token: str) -> _Piece:
        for old, new in replacements:
            token = token.replace(old, new)
        byte = _fallback_byte(token) if has_bytes else None
        return token if byte is None else byte

    def first_piece(token: str) -> _Piece:
        text = piece(token)
        if not drops_space:
            return text
        return text.removeprefix(" ") if isinstance(text, str) else text.removeprefix(b" ")

    return piece, first_piece, _EACH_BYTE


def _flatten(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a decoder, nested sequences laid out flat."""
    if spec is None:
        return []
    if spec.get("type") != "Sequence":
        return [spec]
    return [step for inner in spec["decoders"] for step in _flatten(inner)]


def _fallback_byte(token: str) -> bytes | None:
    """The byte of a token such as "<0xEA>", None for any other token."""
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else None


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE spells a byte as one visible character: itself where it is visible, else from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


def _byte_level_piece(token: str) -> bytes:
    """Bytes of a byte-level token; one that is not spelt in the alphabet (added by hand) is plain text."""
    try:
        return bytes([_BYTE_LEVEL_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
