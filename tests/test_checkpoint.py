"""Checkpoints: the table both ways, every layout, every kind of bad input, atomic saves, bounded memory."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from kogpt_jax import checkpoint, weight_files
from kogpt_jax.config import ModelConfig
from kogpt_jax.errors import InputError
from kogpt_jax.model import model_def
from kogpt_jax.sharding import ONE_DEVICE, Split, make_mesh

REPOSITORY = pathlib.Path(__file__).parents[1]

TINY = ModelConfig(
    vocab_size=37,
    max_len=16,
    model_dim=32,
    num_layers=2,
    num_heads=4,
    rotary_dim=4,
    ffn_dim=48,
    eos_token_ids=(1,),
    dtype="fp32",
)

NUMPY_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What GPTJForCausalLM stores, spelled out independently of the table."""
    v, d, f = config.vocab_size, config.model_dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (v, d)}
    for i in range(config.num_layers):
        h = f"transformer.h.{i}"
        shapes |= {f"{h}.ln_1.weight": (d,), f"{h}.ln_1.bias": (d,)}
        shapes |= {f"{h}.attn.{name}_proj.weight": (d, d) for name in ("k", "v", "q", "out")}
        shapes |= {f"{h}.mlp.fc_in.weight": (f, d), f"{h}.mlp.fc_in.bias": (f,)}
        shapes |= {f"{h}.mlp.fc_out.weight": (d, f), f"{h}.mlp.fc_out.bias": (d,)}
    return shapes | {
        "transformer.ln_f.weight": (d,),
        "transformer.ln_f.bias": (d,),
        "lm_head.weight": (v, d),
        "lm_head.bias": (v,),
    }


def hf_tensors(config, dtype="fp32"):
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(NUMPY_DTYPES[dtype]) for key, shape in hf_shapes(config).items()}


def expected_leaves(tensors, config, split=ONE_DEVICE):
    """The leaves by path, put together by hand."""
    stages, shards = split
    num_padding = -config.vocab_size % (stages * shards)
    vocab = {
        path: np.concatenate([tensors[key], np.zeros((num_padding, *tensors[key].shape[1:]), tensors[key].dtype)])
        for path, key in (
            ("embedding", "transformer.wte.weight"),
            ("lm_head", "lm_head.weight"),
            ("lm_head_bias", "lm_head.bias"),
        )
    }
    layers = []
    for i in range(config.num_layers):
        hf = {key.removeprefix(f"transformer.h.{i}."): value for key, value in tensors.items()}
        wide = [hf[f"attn.{name}_proj.weight"] for name in "qkv"] + [hf["mlp.fc_in.weight"]]
        rows = [np.split(weight, shards) for weight in wide]
        columns = [np.split(hf[f"{name}.weight"], shards, axis=1) for name in ("attn.out_proj", "mlp.fc_out")]
        layers.append(
            {
                "ln_scale": hf["ln_1.weight"],
                "ln_bias": hf["ln_1.bias"],
                "w_in": np.stack([np.concatenate(shard) for shard in zip(*rows, strict=True)]),
                "b_ffn_in": np.stack(np.split(hf["mlp.fc_in.bias"], shards)),
                "w_out": np.stack([np.concatenate(shard, axis=1) for shard in zip(*columns, strict=True)]),
                "b_ffn_out": hf["mlp.fc_out.bias"],
            }
        )
    per_stage = math.ceil(config.num_layers / stages)
    layers += [{name: np.zeros_like(leaf) for name, leaf in layers[0].items()}] * (stages * per_stage - len(layers))
    blocks = {
        f"blocks.{j}.{name}": np.stack([layers[s * per_stage + j][name] for s in range(stages)])
        for j in range(per_stage)
        for name in layers[0]
    }
    return (
        vocab
        | blocks
        | {"ln_f_scale": tensors["transformer.ln_f.weight"], "ln_f_bias": tensors["transformer.ln_f.bias"]}
    )


def assert_leaves_equal(leaves, tensors, config, split=ONE_DEVICE):
    params = model_def(config, split).params
    expected = expected_leaves(tensors, config, split)
    assert {param.path for param in params} == set(expected)
    for param, leaf in zip(params, leaves, strict=True):
        assert (leaf.shape, leaf.dtype) == (param.shape, param.dtype), param.path
        np.testing.assert_array_equal(leaf, expected[param.path].astype(param.dtype), err_msg=param.path)


def write_config(directory, config=TINY):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf_dict()))


def write_single(directory, tensors, config=TINY):
    write_config(directory, config)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_sharded(directory, tensors, config=TINY, num_files=3):
    """Round robin, so that the parts of a fused weight lie in different files."""
    write_config(directory, config)
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        shard = dict(list(tensors.items())[number::num_files])
        safetensors.numpy.save_file(shard, directory / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    write_index(directory, weight_map)
    return directory


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def load(directory, dtype=None):
    config = checkpoint.load_config(directory, dtype=dtype)
    return checkpoint.load_leaves(directory, config, make_mesh()), config


def load_error(directory, config=TINY):
    """The message of the one-line error that loading gives."""
    with pytest.raises(InputError) as caught:
        checkpoint.load_leaves(directory, config, make_mesh())
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- Loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [100, weight_files.BLOCK_BYTES])
@pytest.mark.parametrize("write", [write_single, write_sharded])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_load_as_stored(tmp_path, monkeypatch, dtype, write, block_bytes):
    monkeypatch.setattr(weight_files, "BLOCK_BYTES", block_bytes)
    tensors = hf_tensors(TINY, dtype)
    leaves, config = load(write(tmp_path, tensors))
    assert config == dataclasses.replace(TINY, dtype=dtype)
    assert_leaves_equal(leaves, tensors, config)


@pytest.mark.parametrize("asked", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_load_in_another_dtype(tmp_path, stored, asked):
    tensors = hf_tensors(TINY, stored)
    leaves, config = load(write_single(tmp_path, tensors), dtype=asked)
    assert config.dtype == asked
    assert_leaves_equal(leaves, tensors, config)


def test_mixed_dtypes_take_the_matrices_dtype(tmp_path):
    tensors = {
        key: value.astype(np.float16) if value.ndim == 2 and "q_proj" not in key else value
        for key, value in hf_tensors(TINY).items()
    }
    leaves, config = load(write_single(tmp_path, tensors))
    assert config.dtype == "fp16"
    assert_leaves_equal(leaves, tensors, config)


def with_buffers(tensors, num_layers=TINY.num_layers):
    """With the causal mask and mask value of each layer, as published GPT-J files carry them."""
    buffers = {}
    for i in range(num_layers):
        buffers[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, TINY.max_len, TINY.max_len), np.uint8))
        buffers[f"transformer.h.{i}.attn.masked_bias"] = np.array(-np.inf, np.float32)
    return tensors | buffers


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_mask_buffers_are_allowed(tmp_path, write):
    tensors = hf_tensors(TINY, "fp16")
    leaves, config = load(write(tmp_path, with_buffers(tensors)))
    assert_leaves_equal(leaves, tensors, config)


def test_leaves_do_not_share_memory_with_the_read_ahead_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(weight_files, "_NUM_BUFFERS", 1)
    tensors = hf_tensors(TINY)
    first, config = load(write_single(tmp_path / "first", tensors))
    load(write_single(tmp_path / "second", {key: value + 1 for key, value in tensors.items()}))
    (tmp_path / "first" / "model.safetensors").write_bytes(b"")  # nor with the file
    assert_leaves_equal(first, tensors, config)


def test_progress_goes_to_a_terminal_only(tmp_path, monkeypatch, capsys):
    write_single(tmp_path, hf_tensors(TINY))
    checkpoint.load_leaves(tmp_path, TINY, make_mesh(), progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    checkpoint.load_leaves(tmp_path, TINY, make_mesh(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.safetensors" in err
    checkpoint.load_leaves(tmp_path, TINY, make_mesh())
    assert capsys.readouterr() == ("", "")


# -- Bad input --------------------------------------------------------------------------------------------------------


def test_directory_does_not_exist(tmp_path):
    assert str(tmp_path / "none") in load_error(tmp_path / "none")


def test_directory_without_weights(tmp_path):
    assert str(tmp_path) in load_error(tmp_path)


def test_another_architecture(tmp_path):
    write_single(tmp_path, hf_tensors(TINY))
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf_dict() | {"model_type": "llama"}))
    with pytest.raises(InputError, match="llama"):
        checkpoint.load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {"lm_head.bias": 1}}', "lm_head.bias"),
    ],
)
def test_damaged_index(tmp_path, text, named):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    message = load_error(tmp_path)
    assert str(index) in message
    assert named in message


@pytest.mark.parametrize("name", ["missing.safetensors", "../model.safetensors", "/etc/passwd"])
def test_index_names_a_file_that_is_not_there(tmp_path, name):
    write_single(tmp_path, hf_tensors(TINY))  # ../model.safetensors exists
    directory = write_sharded(tmp_path / "sharded", hf_tensors(TINY))
    write_index(directory, read_index(directory) | {"lm_head.bias": name})
    message = load_error(directory)
    assert "model.safetensors.index.json" in message
    assert "lm_head.bias" in message
    assert name in message


@pytest.mark.parametrize("name", ["notes.txt", "model-00001-of-00003.safetensors.part", "model"])
def test_index_names_a_file_of_another_kind(tmp_path, name):
    write_sharded(tmp_path, hf_tensors(TINY))
    (tmp_path / name).write_text("not weights")
    write_index(tmp_path, read_index(tmp_path) | {"lm_head.bias": name})
    assert load_error(tmp_path) == (
        f"{tmp_path / 'model.safetensors.index.json'}: key 'lm_head.bias' names {name}, "
        "expected a file that ends in .safetensors or .bin"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_that_are_no_file(tmp_path, name):
    """They are not passed over for another layout that is there, either."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    path = tmp_path / name
    path.mkdir()
    assert load_error(tmp_path) == f"{path} is not a file"
    path.rmdir()
    path.symlink_to(tmp_path / "blob")
    assert load_error(tmp_path) == f"{path} is a link to {tmp_path / 'blob'}, which does not exist"


def test_weights_behind_a_link(tmp_path):
    directory = tmp_path / "linked"
    write_single(tmp_path, hf_tensors(TINY))
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).symlink_to(tmp_path / name)
    assert checkpoint.stored_dtype(directory) == checkpoint.stored_dtype(tmp_path)


def test_shard_is_missing(tmp_path):
    write_sharded(tmp_path, hf_tensors(TINY))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in load_error(tmp_path)


def test_index_names_the_wrong_file(tmp_path):
    write_sharded(tmp_path, hf_tensors(TINY))
    weight_map = read_index(tmp_path)
    other = next(name for name in weight_map.values() if name != weight_map["lm_head.bias"])
    write_index(tmp_path, weight_map | {"lm_head.bias": other})
    message = load_error(tmp_path)
    assert "lm_head.bias" in message
    assert other in message


def test_index_names_a_key_that_no_file_has(tmp_path):
    tensors = hf_tensors(TINY)
    del tensors["lm_head.bias"]
    write_sharded(tmp_path, tensors)
    write_index(tmp_path, read_index(tmp_path) | {"lm_head.bias": "model-00001-of-00003.safetensors"})
    message = load_error(tmp_path)
    assert "lm_head.bias" in message
    assert "model-00001-of-00003.safetensors" in message


def test_key_that_the_index_does_not_name(tmp_path):
    write_sharded(tmp_path, hf_tensors(TINY))
    weight_map = read_index(tmp_path)
    name = weight_map.pop("lm_head.bias")
    write_index(tmp_path, weight_map)
    message = load_error(tmp_path)
    assert "lm_head.bias" in message
    assert name in message


def test_key_in_two_shards(tmp_path):
    tensors = hf_tensors(TINY)
    write_sharded(tmp_path, tensors)
    name = next(name for key, name in read_index(tmp_path).items() if name != read_index(tmp_path)["lm_head.bias"])
    with safetensors.safe_open(tmp_path / name, framework="numpy") as file:
        shard = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    safetensors.numpy.save_file(shard | {"lm_head.bias": tensors["lm_head.bias"]}, tmp_path / name)
    message = load_error(tmp_path)
    assert "lm_head.bias" in message
    assert name in message
    assert read_index(tmp_path)["lm_head.bias"] in message


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_file(tmp_path, kept):
    write_sharded(tmp_path, hf_tensors(TINY))
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in load_error(tmp_path)
    with pytest.raises(InputError, match=path.name):
        checkpoint.load_config(tmp_path)


def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = write_single(tmp_path, hf_tensors(TINY)) / "model.safetensors"
    read_ahead = weight_files.read_ahead

    def shrink_first(blocks):
        os.truncate(path, 5000)
        return read_ahead(blocks)

    monkeypatch.setattr(checkpoint, "read_ahead", shrink_first)
    message = load_error(tmp_path)
    assert str(path) in message
    assert "ends early" in message


@pytest.mark.parametrize(
    ("key", "shape"),
    [("transformer.h.1.attn.extra.weight", (32, 32)), ("transformer.h.2.ln_1.bias", (32,)), ("score.weight", (2, 32))],
)
def test_unknown_key(tmp_path, key, shape):
    write_single(tmp_path, hf_tensors(TINY) | {key: np.zeros(shape, np.float32)})
    message = load_error(tmp_path)
    assert key in message
    assert str(tmp_path / "model.safetensors") in message


def test_mask_buffer_of_a_layer_that_is_not_there(tmp_path):
    write_single(tmp_path, with_buffers(hf_tensors(TINY), num_layers=3))
    assert "transformer.h.2.attn." in load_error(tmp_path)


def test_keys_of_the_model_without_head(tmp_path):
    tensors = hf_tensors(TINY)
    write_single(tmp_path, {key.removeprefix("transformer."): value for key, value in tensors.items()})
    message = load_error(tmp_path)
    assert "GPTJForCausalLM" in message
    assert str(tmp_path / "model.safetensors") in message
    with pytest.raises(InputError, match="GPTJForCausalLM"):
        checkpoint.load_config(write_single(tmp_path, {"wte.weight": tensors["transformer.wte.weight"]}))


@pytest.mark.parametrize("key", sorted(hf_shapes(dataclasses.replace(TINY, num_layers=1))))
def test_unfilled_key(tmp_path, key):
    tensors = hf_tensors(TINY)
    del tensors[key]
    message = load_error(write_single(tmp_path, tensors))
    assert key in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("key", sorted(hf_shapes(dataclasses.replace(TINY, num_layers=1))))
def test_wrong_shape(tmp_path, key):
    tensors = hf_tensors(TINY)
    shape = tensors[key].shape
    tensors[key] = np.zeros((*shape[:-1], shape[-1] + 1), np.float32)
    message = load_error(write_single(tmp_path, tensors))
    assert str(tmp_path / "model.safetensors") in message
    assert key in message
    assert str(list(shape)) in message
    assert str(list(tensors[key].shape)) in message


def test_transposed_weight(tmp_path):
    tensors = hf_tensors(TINY)
    key = "transformer.h.0.mlp.fc_in.weight"
    tensors[key] = np.ascontiguousarray(tensors[key].T)
    assert key in load_error(write_single(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.int32, np.bool_])
@pytest.mark.parametrize("key", ["transformer.h.1.attn.k_proj.weight", "lm_head.bias"])
def test_wrong_dtype(tmp_path, key, dtype):
    tensors = hf_tensors(TINY)
    tensors[key] = tensors[key].astype(dtype)
    message = load_error(write_single(tmp_path, tensors))
    assert key in message
    assert str(tmp_path / "model.safetensors") in message


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_values_that_are_not_finite(tmp_path, dtype, value):
    tensors = hf_tensors(TINY, dtype)
    key = "transformer.h.1.mlp.fc_out.weight"
    tensors[key][-1, -1] = value
    message = load_error(write_sharded(tmp_path, tensors), dataclasses.replace(TINY, dtype=dtype))
    assert key in message
    assert str(tmp_path / read_index(tmp_path)[key]) in message


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_largest_values_are_finite(tmp_path, dtype):
    tensors = hf_tensors(TINY, dtype)
    tensors["lm_head.bias"][:2] = ml_dtypes.finfo(NUMPY_DTYPES[dtype]).max * np.array([1, -1], NUMPY_DTYPES[dtype])
    leaves, config = load(write_single(tmp_path, tensors))
    assert_leaves_equal(leaves, tensors, config)


@pytest.mark.parametrize("key", ["transformer.h.1.mlp.fc_in.weight", "transformer.ln_f.bias"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_values_too_large_for_the_dtype_asked_for(tmp_path, dtype, key):
    tensors = hf_tensors(TINY, dtype)
    tensors[key].reshape(-1)[-1] = 70000
    message = load_error(write_sharded(tmp_path, tensors), dataclasses.replace(TINY, dtype="fp16"))
    assert key in message
    assert "float16" in message
    assert str(tmp_path / read_index(tmp_path)[key]) in message


def test_torch_file_without_torch(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = load_error(tmp_path)
    assert "pytorch_model.bin" in message
    assert "pip install kogpt-jax[torch]" in message


# -- Saving -----------------------------------------------------------------------------------------------------------


def leaves_of(tensors, config, split=ONE_DEVICE):
    expected = expected_leaves(tensors, config, split)
    return [jnp.asarray(expected[param.path].astype(param.dtype)) for param in model_def(config, split).params]


def stored(directory):
    tensors: dict[str, np.ndarray] = {}
    for path in directory.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
        tensors |= safetensors.numpy.load_file(path)
    return tensors


@pytest.mark.parametrize("split", [Split(1, 1), Split(1, 2), Split(1, 4), Split(3, 2), Split(2, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_save_splits_fused_weights_again(tmp_path, dtype, split):
    config = dataclasses.replace(TINY, dtype=dtype)
    tensors = hf_tensors(config, dtype)
    target = tmp_path / "new" / "model"
    checkpoint.save_pretrained(target, config, leaves_of(tensors, config, split), split=split)
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    written = stored(target)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": 1}
    leaves, loaded = load(target)
    assert loaded == config
    assert_leaves_equal(leaves, tensors, config)


def test_save_in_shards(tmp_path):
    tensors = hf_tensors(TINY)
    checkpoint.save_pretrained(tmp_path, TINY, leaves_of(tensors, TINY), max_shard_bytes=10_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    assert all(sum(value.nbytes for value in safetensors.numpy.load_file(path).values()) <= 10_000 for path in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in tensors.values())}
    leaves, config = load(tmp_path)
    assert_leaves_equal(leaves, tensors, config)


def test_save_keeps_no_host_copy_of_a_leaf(tmp_path):
    leaves = leaves_of(hf_tensors(TINY), TINY)
    checkpoint.save_pretrained(tmp_path / "model", TINY, leaves)
    assert all(leaf._npy_value is None for leaf in leaves)


def test_save_copies_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    leaves = leaves_of(hf_tensors(TINY), TINY)
    checkpoint.save_pretrained(tmp_path / "model", TINY, leaves, tokenizer_files=[tmp_path / "tokenizer.model"])
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"pieces"
    with pytest.raises(InputError, match="vocab.json"):
        checkpoint.save_pretrained(tmp_path / "other", TINY, leaves, tokenizer_files=[tmp_path / "vocab.json"])
    config_json = tmp_path / "model" / "config.json"
    with pytest.raises(InputError, match=r"config\.json"):
        checkpoint.save_pretrained(tmp_path / "other", TINY, leaves, tokenizer_files=[config_json])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer.model"]


def test_save_refuses_what_is_there(tmp_path):
    leaves = leaves_of(hf_tensors(TINY), TINY)
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match=str(target)):
            checkpoint.save_pretrained(target, TINY, leaves)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_save_refuses_leaves_of_another_model(tmp_path):
    leaves = leaves_of(hf_tensors(TINY), TINY)
    with pytest.raises(ValueError, match="bfloat16"):
        checkpoint.save_pretrained(tmp_path / "model", dataclasses.replace(TINY, dtype="bf16"), leaves)
    with pytest.raises(ValueError, match="longer|shorter"):
        checkpoint.save_pretrained(tmp_path / "model", TINY, leaves[:-1])
    with pytest.raises(InputError, match="max_shard_bytes"):
        checkpoint.save_pretrained(tmp_path / "model", TINY, leaves, max_shard_bytes=0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "No space left on device"), InputError)]
)
@pytest.mark.parametrize("target", ["new/parents/model", "empty"])
def test_failed_save_leaves_nothing(tmp_path, monkeypatch, target, raised, seen):
    (tmp_path / "empty").mkdir()
    fetch = checkpoint._fetch
    calls = []

    def fail_at_fifth(*args):
        calls.append(args)
        if len(calls) == 5:
            raise raised
        return fetch(*args)

    monkeypatch.setattr(checkpoint, "_fetch", fail_at_fifth)
    with pytest.raises(seen):
        checkpoint.save_pretrained(tmp_path / target, TINY, leaves_of(hf_tensors(TINY), TINY))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not any((tmp_path / "empty").iterdir())


# -- Meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [2, 3])
@pytest.mark.parametrize("extents", [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 4, 1), (1, 2, 4)], ids=str)
def test_each_device_of_a_mesh_gets_its_own(tmp_path, monkeypatch, extents, num_layers):
    """Its stage's layers, its heads, FFN units and tokens, replicas included; what is saved is the checkpoint again."""
    monkeypatch.setattr(weight_files, "BLOCK_BYTES", 500)
    config = dataclasses.replace(TINY, num_layers=num_layers)
    mesh = make_mesh(*extents)
    tensors = hf_tensors(config)
    write_sharded(tmp_path / "model", tensors, config)
    leaves = checkpoint.load_leaves(tmp_path / "model", config, mesh)
    assert_leaves_equal(leaves, tensors, config, Split.of(mesh))
    by_path = {param.path: leaf for param, leaf in zip(model_def(config, Split.of(mesh)).params, leaves, strict=True)}
    _, pipe, tensor = extents
    rows, layers_per_stage = TINY.model_dim // tensor, math.ceil(num_layers / pipe)
    embedding = np.pad(tensors["transformer.wte.weight"], ((0, -TINY.vocab_size % (pipe * tensor)), (0, 0)))
    assert len(by_path["blocks.0.w_in"].addressable_shards) == math.prod(extents)
    for shard, tokens in zip(
        by_path["blocks.0.w_in"].addressable_shards, by_path["embedding"].addressable_shards, strict=True
    ):
        assert shard.device == tokens.device
        _, stage, part = np.argwhere(mesh.devices == shard.device)[0]
        layer = stage * layers_per_stage
        q = tensors.get(f"transformer.h.{layer}.attn.q_proj.weight", np.zeros((TINY.model_dim, TINY.model_dim)))
        np.testing.assert_array_equal(shard.data[0, 0, :rows], q[rows * part : rows * (part + 1)])
        own_tokens = np.split(embedding, pipe * tensor)[stage * tensor + part]
        np.testing.assert_array_equal(tokens.data, own_tokens)
    checkpoint.save_pretrained(tmp_path / "again", config, leaves, split=Split.of(mesh))
    loaded, _ = load(tmp_path / "again")
    assert_leaves_equal(loaded, tensors, config)


# -- In processes of their own ----------------------------------------------------------------------------------------


def run_script(script, *args, **environment):
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_host_memory_while_loading(tmp_path):
    """Beyond the arrays kept, a load holds at no time more than twice the largest tensor and a fixed amount.

    That amount is 300 MB for any model; here it is what this small one allows, so that holding the whole of it fails:
    the read-ahead buffers, and for a conversion XLA's compiler.
    """
    script = """
        import pathlib, sys
        from benchmarks import bench_load

        directory = pathlib.Path(sys.argv[1])
        config = bench_load.config_of_size(300e6, model_dim=1024, vocab_size=8000)
        bench_load.write_checkpoint(directory / "model", config, seed=0)
        print(bench_load.largest_tensor_bytes(config))
    """
    largest = int(run_script(script, tmp_path))
    script = """
        import sys
        from benchmarks import bench_load

        result = bench_load.measure_load(sys.argv[1], sys.argv[2], mesh_name=sys.argv[3])
        print(result["loaded_bytes"], result["device_bytes"], result["peak_beyond_arrays_bytes"])
    """
    # On a mesh a leaf holds a layer of each of its two stages.
    for dtype, mesh, allowance in (
        ("fp16", "d1p1t1", 80e6),
        ("bf16", "d1p1t1", 200e6),
        ("fp16", "d1p2t4", 80e6 + 2 * largest),
    ):
        loaded, on_device, peak = map(int, run_script(script, tmp_path / "model", dtype, mesh).split())
        assert loaded > 2 * largest + allowance
        assert peak <= 2 * largest + allowance
        num_devices = 8 if mesh == "d1p2t4" else 1
        assert loaded <= num_devices * on_device <= 1.01 * loaded  # each its share; LayerNorm is on all


# -- Against PyTorch and transformers ---------------------------------------------------------------------------------


@pytest.fixture
def hf_model():
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**TINY.to_hf_dict()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def numpy_state(model):
    return {key: value.float().numpy() for key, value in model.state_dict().items()}


@pytest.mark.oracle
@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_load_what_transformers_saves(tmp_path, hf_model, dtype, max_shard_size):
    import torch

    hf_model = hf_model.to(getattr(torch, dtype))
    hf_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    leaves, config = load(tmp_path)
    assert config.jax_dtype.name == dtype
    assert_leaves_equal(leaves, numpy_state(hf_model), config)


@pytest.mark.oracle
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 10_000])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_transformers_loads_what_we_save(tmp_path, dtype, max_shard_bytes):
    import transformers

    config = dataclasses.replace(TINY, dtype=dtype)
    tensors = hf_tensors(config, dtype)
    checkpoint.save_pretrained(tmp_path / "model", config, leaves_of(tensors, config), max_shard_bytes=max_shard_bytes)
    model, info = transformers.GPTJForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype="auto"
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(problem), problem
    assert str(model.dtype).removeprefix("torch.") == config.jax_dtype.name
    assert model.generation_config.eos_token_id == 1
    state = numpy_state(model)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(state[key], tensor.astype(np.float32), err_msg=key)


@pytest.mark.oracle
@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_load_torch_files(tmp_path, hf_model, dtype, num_files):
    import torch

    hf_model = hf_model.to(getattr(torch, dtype))
    state = dict(hf_model.state_dict())
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    key = "transformer.h.0.mlp.fc_in.weight"
    state[key] = state[key].T.contiguous().T  # stored with its strides
    write_config(tmp_path)
    write_torch(tmp_path, state, num_files)
    leaves, config = load(tmp_path)
    assert config.jax_dtype.name == dtype
    assert_leaves_equal(leaves, numpy_state(hf_model), config)


def write_torch(directory, state, num_files):
    import torch

    if num_files == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        shard = dict(list(state.items())[number::num_files])
        torch.save(shard, directory / name)
        weight_map.update(dict.fromkeys(shard, name))
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.oracle
def test_safetensors_go_before_torch_files(tmp_path, hf_model):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    hf_model.save_pretrained(tmp_path)
    leaves, config = load(tmp_path)
    assert_leaves_equal(leaves, numpy_state(hf_model), config)


@pytest.mark.oracle
@pytest.mark.parametrize("damage", ["truncated", "legacy", "code", "list", "not a tensor", "int8", "nan"])
def test_damaged_torch_file(tmp_path, hf_model, damage):
    import torch

    path = tmp_path / "pytorch_model.bin"
    state = dict(hf_model.state_dict())
    match damage:
        case "truncated":
            torch.save(state, path)
            path.write_bytes(path.read_bytes()[:-1000])
        case "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        case "code":
            torch.save({"lm_head.bias": pathlib.Path("x")}, path)
        case "list":
            torch.save([1], path)
        case "not a tensor":
            torch.save(state | {"lm_head.bias": 1}, path)
        case "int8":
            torch.save(state | {"lm_head.bias": torch.zeros(TINY.vocab_size, dtype=torch.int8)}, path)
        case "nan":
            torch.save(state | {"lm_head.bias": torch.full((TINY.vocab_size,), torch.nan)}, path)
    message = load_error(tmp_path)
    assert str(path) in message
    if damage in ("not a tensor", "int8", "nan"):
        assert "lm_head.bias" in message
