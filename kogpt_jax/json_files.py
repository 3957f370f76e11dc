"""JSON files that hold one object, read and written."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from kogpt_jax.errors import InputError, one_line


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a UTF-8 file with a JSON object holds.

    Raises:
        InputError: the file cannot be read, is not JSON, is nested too deeply, or holds something else than an object.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or an integer of too many digits
        raise InputError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes an object, over what is there.

    Raises:
        OSError: the file system refuses.
    """
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
