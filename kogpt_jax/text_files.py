"""Text files that a model is calibrated or measured on: which one it was, and the tokens of its documents."""

import dataclasses
import hashlib
import pathlib

from kogpt_jax.errors import InputError
from kogpt_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of UTF-8 text, read."""

    path: pathlib.Path
    sha256: str
    num_bytes: int
    text: str

    @property
    def identity(self) -> dict[str, str | int]:
        """What tells this content from another's, as JSON has it."""
        return {"sha256": self.sha256, "bytes": self.num_bytes}


def read_text_file(what: str, path: pathlib.Path) -> TextFile:
    """Reads a file; ``what`` names it in errors.

    Raises:
        InputError: it cannot be read, is not UTF-8, or holds nothing but space.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise InputError(f"{what} {path} holds no text")
    return TextFile(path, hashlib.sha256(raw).hexdigest(), len(raw), text)


def line_documents(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Each line that is not blank as a document of its own: between end-of-text tokens, where the tokenizer has one, as
    in the training of GPT-J models, so that its first token is predicted from something."""
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    # Not splitlines(): that also splits at characters that stand inside a line, such as U+2028.
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return [[*eos, *tokenizer.encode(line), *eos] for line in lines]
