"""`ModelConfig`: what Hugging Face's ``config.json`` says, what is refused, and by which name."""

import dataclasses
import json
import math

import numpy as np
import pytest
from small_model import unchecked_types

from kogpt_jax.config import DEMO, DTYPES, KOGPT_6B, ModelConfig
from kogpt_jax.errors import InputError
from kogpt_jax.json_files import write_json
from kogpt_jax.model import model_def

# The facts of EleutherAI/gpt-j-6b's config.json that a GPT-J is made of, with keys that are of no concern here.
GPT_J_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "use_cache": True,
    "vocab_size": 50400,
}
SMALL = ModelConfig(
    vocab_size=11, max_len=12, model_dim=24, num_layers=2, num_heads=3, rotary_dim=4, ffn_dim=7, eos_token_ids=(1, 3)
)


def test_gpt_j_6b_is_kogpt_6b_with_another_vocabulary():
    config = ModelConfig.from_hf_dict(GPT_J_6B)
    assert config == dataclasses.replace(KOGPT_6B, vocab_size=50400, eos_token_ids=(50256,))


def test_absent_keys_take_the_defaults_of_gpt_j():
    defaults = ModelConfig.from_hf_dict({"model_type": "gptj"})
    assert defaults == dataclasses.replace(ModelConfig.from_hf_dict(GPT_J_6B), eos_token_ids=())


def test_ffn_dim_is_n_inner_or_four_times_n_embd():
    assert ModelConfig.from_hf_dict(GPT_J_6B).ffn_dim == 4 * 4096
    without = {key: value for key, value in GPT_J_6B.items() if key != "n_inner"}
    assert ModelConfig.from_hf_dict({**without, "n_embd": 1024}).ffn_dim == 4 * 1024
    assert ModelConfig.from_hf_dict({**GPT_J_6B, "n_inner": 1000}).ffn_dim == 1000


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_the_names_of_tanh_gelu(name):
    assert ModelConfig.from_hf_dict({**GPT_J_6B, "activation_function": name}).ffn_dim == 16384


@pytest.mark.parametrize(
    ("eos_token_id", "expected"),
    [(7, (7,)), ([7, 2], (7, 2)), (None, ()), ([], ()), (0, (0,)), (50399, (50399,)), (50400, ()), ([-1, 5], (5,))],
)
def test_eos_token_ids(eos_token_id, expected):
    assert ModelConfig.from_hf_dict({**GPT_J_6B, "eos_token_id": eos_token_id}).eos_token_ids == expected


def test_kogpt_6b_has_the_parameters_of_its_model_card():
    assert sum(math.prod(param.shape) for param in model_def(KOGPT_6B).params) == 6_166_502_400
    assert (KOGPT_6B.num_layers, KOGPT_6B.model_dim, KOGPT_6B.ffn_dim) == (28, 4096, 16384)
    assert (KOGPT_6B.num_heads, KOGPT_6B.head_dim, KOGPT_6B.rotary_dim) == (16, 256, 64)
    assert (KOGPT_6B.max_len, KOGPT_6B.vocab_size, KOGPT_6B.layer_norm_epsilon) == (2048, 64512, 1e-5)


@pytest.mark.parametrize(
    "config", [KOGPT_6B, DEMO, SMALL, dataclasses.replace(SMALL, eos_token_ids=(), layer_norm_epsilon=1e-12)], ids=str
)
def test_round_trip_through_a_file(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()), encoding="utf-8")
    assert ModelConfig.from_hf_dir(tmp_path, dtype=config.dtype) == config


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_caller_counts_and_not_that_of_the_file(dtype):
    hf = {**GPT_J_6B, "torch_dtype": "float64"}
    assert ModelConfig.from_hf_dict(hf, dtype=dtype).dtype == dtype
    assert ModelConfig.from_hf_dict(hf, dtype=dtype).jax_dtype.itemsize == {"fp32": 4, "fp16": 2, "bf16": 2}[dtype]


REFUSED = [
    ("model_type", "gpt2"),
    ("model_type", None),
    ("activation_function", "gelu"),
    ("activation_function", "relu"),
    ("activation_function", None),
    ("tie_word_embeddings", True),
    ("quantization_config", {"bits": 4}),
    ("vocab_size", 50400.0),
    ("vocab_size", "50400"),
    ("vocab_size", None),
    ("vocab_size", 0),
    ("n_positions", True),
    ("n_positions", -1),
    ("n_embd", [4096]),
    ("n_layer", 28.5),
    ("n_layer", 0),
    ("n_head", False),
    ("n_head", None),
    ("n_inner", True),
    ("n_inner", "4x"),
    ("n_inner", 0),
    ("rotary_dim", None),
    ("rotary_dim", 63),
    ("rotary_dim", 258),
    ("layer_norm_epsilon", "tiny"),
    ("layer_norm_epsilon", True),
    ("layer_norm_epsilon", None),
    ("layer_norm_epsilon", 0),
    ("layer_norm_epsilon", float("nan")),
    ("eos_token_id", "[EOS]"),
    ("eos_token_id", 1.0),
    ("eos_token_id", [1, True]),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=str)
def test_refused_by_file_key_and_value(key, value):
    with pytest.raises(InputError) as caught:
        ModelConfig.from_hf_dict({**GPT_J_6B, key: value}, source="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert key in message
    assert isinstance(value, dict) or str(value).lower() in message.lower()
    assert len(message.splitlines()) == 1
    assert message.count("some/config.json") == 1


def test_another_architecture_is_refused():
    with pytest.raises(InputError, match="model_type must be 'gptj', got 'llama'"):
        ModelConfig.from_hf_dict({"model_type": "llama", "n_embd": 64})
    with pytest.raises(InputError, match="model_type must be 'gptj', got None"):
        ModelConfig.from_hf_dict({})


def test_sizes_that_do_not_fit_each_other_name_the_file_and_both():
    with pytest.raises(InputError, match=r"^x/config\.json: .*4096.*\b15$"):
        ModelConfig.from_hf_dict({**GPT_J_6B, "n_head": 15}, source="x/config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: 0}, f"{name} must be at least 1, got 0")
            for name in ("vocab_size", "max_len", "model_dim", "num_layers", "num_heads", "rotary_dim", "ffn_dim")
        ],
        ({"num_heads": 5}, "model_dim 24 is not a multiple of num_heads 5"),
        ({"rotary_dim": 3}, "rotary_dim must be even and at most head_dim 8, got 3"),
        ({"rotary_dim": 10}, "rotary_dim must be even and at most head_dim 8, got 10"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon must be positive, got -1e-05"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon must be positive, got nan"),
        ({"eos_token_ids": (1, 11)}, "eos_token_ids holds 11, outside the vocabulary of 11"),
        ({"eos_token_ids": (-1,)}, "eos_token_ids holds -1, outside the vocabulary of 11"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_cannot_be_made(changes, message):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(SMALL, **changes)
    assert str(caught.value) == message


def test_unknown_dtype_is_refused():
    with unchecked_types(), pytest.raises(InputError, match="dtype must be one of fp32, fp16, bf16, got 'float8'"):
        dataclasses.replace(SMALL, dtype="float8")  # type: ignore[arg-type]


def test_configs_are_frozen_and_hash_by_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.num_layers = 3  # type: ignore[misc]
    assert hash(SMALL) == hash(dataclasses.replace(SMALL))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"model_type": "gptj",}'])
def test_broken_file_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        ModelConfig.from_hf_dir(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file_and_directory_are_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing in .*" + tmp_path.name):
        ModelConfig.from_hf_dir(tmp_path)
    with pytest.raises(InputError, match="does not exist: .*nowhere"):
        ModelConfig.from_hf_dir(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("named", "expected"),
    [(5, (5,)), ([7, 9], (7, 9)), (None, (3,)), (50256, ())],
    ids=["one", "two", "null", "beyond"],
)
def test_end_of_text_ids_of_the_generation_config_count(tmp_path, named, expected):
    config = dataclasses.replace(DEMO, eos_token_ids=(3,))
    write_json(tmp_path / "config.json", config.to_hf_dict())
    write_json(tmp_path / "generation_config.json", {"eos_token_id": named})
    assert ModelConfig.from_hf_dir(tmp_path, dtype="fp16").eos_token_ids == expected


def test_a_wrong_generation_config_is_named(tmp_path):
    write_json(tmp_path / "config.json", DEMO.to_hf_dict())
    write_json(tmp_path / "generation_config.json", {"eos_token_id": "[EOS]"})
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id must hold integers"):
        ModelConfig.from_hf_dir(tmp_path)


def test_kv_dtype():
    """The model's own dtype has one name, so that equal models are equal."""
    same = dataclasses.replace(SMALL, dtype="fp16", kv_dtype="fp16")
    assert same == dataclasses.replace(SMALL, dtype="fp16")
    assert same.kv_dtype is None
    assert same.cache_dtype == np.float16
    assert dataclasses.replace(same, dtype="fp32").cache_dtype == np.float32
    assert dataclasses.replace(SMALL, kv_dtype="int8").cache_dtype == np.int8
    for kv_dtype in ("fp32", "fp8", ""):
        with pytest.raises(InputError, match=f"kv_dtype must be fp16 .the model's dtype. or int8, got '{kv_dtype}'"):
            dataclasses.replace(same, kv_dtype=kv_dtype)
