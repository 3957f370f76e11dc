"""Texts that the command line is given, from options, files and stdin, each with the place it came from."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO, cast

from kogpt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextRow:
    """One text from the caller."""

    where: str  # what an error names: "--prompt 2", "stdin line 7"
    text: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `SamplingParams`, this row's own


def argument_rows(option: str, texts: Sequence[str]) -> list[TextRow]:
    """A row for each use of an option; an empty one is refused."""
    rows = [TextRow(option if len(texts) == 1 else f"{option} {i}", text) for i, text in enumerate(texts, 1)]
    for row in rows:
        if not row.text:
            raise InputError(f"{row.where} is empty")
    return rows


def stdin_rows(options: str) -> list[TextRow]:
    """Rows of what is piped in; ``options`` are what could have been used instead."""
    stdin = cast(TextIO | None, sys.stdin)  # None where the shell closed it
    if stdin is None or stdin.isatty():
        raise InputError(f"no text given: use {options}, or pipe lines into stdin")
    return line_rows("stdin", stdin.buffer.read())


def line_rows(source: str, raw: bytes) -> list[TextRow]:
    """A row for each line. Blank lines are refused: dropping them would shift every index after them."""
    # Only line feeds end a line: the others that `str.splitlines` knows may stand in a text.
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{source} is empty: expected one text a line")
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{source} line {number}"
        text = decode_utf8(where, line).removesuffix("\r")
        if not text.strip():
            raise InputError(f"{where} is blank")
        rows.append(TextRow(where, text))
    return rows


def decode_utf8(where: str, raw: bytes) -> str:
    """Bytes that came from ``where`` as text; others than UTF-8 are refused."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}") from error


# What a row may say of itself, and the JSON types it may say it in.
_ROW_OPTIONS: dict[str, tuple[tuple[type, ...], str]] = {
    "max_new_tokens": ((int,), "an integer"),
    "temperature": ((int, float), "a number"),
    "top_k": ((int,), "an integer"),
    "top_p": ((int, float), "a number"),
    "min_p": ((int, float), "a number"),
    "seed": ((int, type(None)), "an integer or null"),
}


def json_row(row: TextRow) -> TextRow:
    """Reads a line of JSON lines."""
    try:
        fields = json.loads(row.text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{row.where} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{row.where} must hold a JSON object, got {type(fields).__name__}")
    if "prompt" not in fields:
        raise InputError(f"{row.where}: key 'prompt' is missing")
    prompt = fields.pop("prompt")
    if not isinstance(prompt, str):
        raise InputError(f"{row.where}: prompt must be a string, got {prompt!r:.80}")
    if not prompt:
        raise InputError(f"{row.where}: prompt is empty")
    options = {key: _checked_option(row.where, key, value) for key, value in fields.items()}
    return TextRow(row.where, prompt, options)


def _checked_option(where: str, key: str, value: Any) -> Any:
    """The value, if a row may hold that key and the key such a value."""
    if key not in _ROW_OPTIONS:
        raise InputError(f"{where}: unknown key {key!r}, expected prompt, {', '.join(_ROW_OPTIONS)}")
    types, words = _ROW_OPTIONS[key]
    if not isinstance(value, types) or isinstance(value, bool):
        raise InputError(f"{where}: {key} must be {words}, got {value!r:.80}")
    if float not in types:
        return value
    try:
        return float(cast(float, value))
    except OverflowError:  # JSON has integers that no float holds
        raise InputError(f"{where}: {key} is too large") from None
