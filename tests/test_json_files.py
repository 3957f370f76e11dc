"""The one reader of JSON files, by itself and behind each of the files that are read with it."""

import os
import pathlib

import pytest

from kogpt_jax import InputError, ModelConfig, checkpoint
from kogpt_jax.demo import data, export
from kogpt_jax.json_files import read_json_object, write_json
from kogpt_jax.tokenizer import load_tokenizer

_TOO_DEEP = b"[" * 100_000


def _refused(read, path: pathlib.Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1
    return message


def test_written_and_read(tmp_path):
    value = {"이름": "값", "numbers": [1, 2.5, None, True], "object": {}}
    write_json(tmp_path / "a.json", value)
    assert read_json_object(tmp_path / "a.json") == read_json_object(str(tmp_path / "a.json")) == value


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (_TOO_DEEP, "is not valid JSON"),
        (b'{"a": ' * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
    ],
    ids=str,
)
def test_what_is_no_object_is_refused(tmp_path, content, named):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert named in _refused(read_json_object, path)


def test_what_cannot_be_read_is_refused(tmp_path):
    assert "cannot be read: No such file" in _refused(read_json_object, tmp_path / "missing.json")
    assert "cannot be read: Is a directory" in _refused(read_json_object, tmp_path)
    path = tmp_path / "closed.json"
    path.write_text("{}")
    path.chmod(0)
    if not os.access(path, os.R_OK):  # the superuser reads it all the same
        assert "cannot be read: Permission denied" in _refused(read_json_object, path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda path: ModelConfig.from_hf_dir(path.parent)),
        ("model.safetensors.index.json", lambda path: checkpoint.stored_dtype(path.parent)),
        ("tokenizer.json", load_tokenizer),
        ("data.json", lambda path: data.load(path.parent)),
        ("training.json", lambda path: export.export([path.parent], path.parent, path.parent / "out", path)),
    ],
)
def test_every_file_is_read_so(tmp_path, name, read):
    for split in data.SPLITS:
        (tmp_path / f"{split}.npy").touch()
    path = tmp_path / name
    path.write_bytes(_TOO_DEEP)
    assert "is not valid JSON" in _refused(read, path)
