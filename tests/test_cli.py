"""The `kogpt` command, on a tiny model. Tests about pipes, signals and terminals start processes of their own.

What the engine refuses, its own tests cover; here one of each kind shows what reaches the shell.
"""

import dataclasses
import inspect
import io
import json
import math
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import typer.core
import typer.main
import typer.testing
from hash_weights import hash_state_dict, write_checkpoint

import custom_ops
import kogpt_jax
from custom_ops import autotune
from kogpt_jax import KoGPT, SamplingParams, cli, smoothing, tuning
from kogpt_jax.config import DTYPES
from kogpt_jax.ops import describe, resolve_ops

_ROOT = pathlib.Path(kogpt_jax.__file__).parent.parent
_SENTENCES = [
    "나는 오늘 학교에 갔다.",
    "이 영화는 정말 재미있다!",
    "서울은 대한민국의 수도이다.",
    "The quick brown fox.",
]
_MAX_LEN = 2048


def _train_tokenizer(path: pathlib.Path) -> int:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        bos_id=0,
        eos_id=1,
        unk_id=2,
        pad_id=3,
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        pad_piece="[PAD]",
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tiny")
    config = kogpt_jax.ModelConfig(
        vocab_size=_train_tokenizer(directory / "tokenizer.model"),
        max_len=_MAX_LEN,
        model_dim=32,
        num_layers=1,
        num_heads=2,
        rotary_dim=8,
        ffn_dim=64,
        eos_token_ids=(1,),
    )
    write_checkpoint(directory, config.to_hf_dict())
    # Texts as long as a test asks for, also where it samples: nothing ends before.
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors["lm_head.bias"][1] = -100
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def engine(checkpoint) -> KoGPT:
    return KoGPT.from_pretrained(checkpoint, max_batch_size=2)  # few batch sizes, few programs to compile


def _invoke(*args: object, stdin: str | bytes = "") -> typer.testing.Result:
    result = typer.testing.CliRunner().invoke(cli.app, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _output(*args: object, stdin: str | bytes = "") -> str:
    """Stdout of a run that succeeds and has nothing to say on stderr."""
    result = _invoke(*args, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def _records(output: str) -> list[dict]:
    return [json.loads(line) for line in output.removesuffix("\n").split("\n")]


def _assert_refused(result, *named: str, code: int = 2) -> None:
    """One line on stderr that names the matter, nothing on stdout."""
    assert result.stderr.startswith("kogpt: error: ")
    assert result.stderr.count("\n") == 1
    for name in named:
        assert name in result.stderr
    assert result.stdout == ""
    assert (result.exit_code if isinstance(result, typer.testing.Result) else result.returncode) == code


def _start(*args: object, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment: str):
    """``kogpt`` as the shell starts it; a Python warning ends it."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONWARNINGS": "error", **environment}
    command = [sys.executable, "-m", "kogpt_jax", *map(str, args)]
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    return subprocess.Popen(command, env=environment, text=True, encoding="utf-8", start_new_session=True, **streams)


def _run(*args: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    with _start(*args, stdin=subprocess.PIPE, **environment) as process:
        output, errors = process.communicate(stdin, timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


# -- The command itself -----------------------------------------------------------------------------------------------


def _commands() -> dict[str, Any]:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    return dict(group.commands)


def test_version():
    assert _output("--version") == f"kogpt {kogpt_jax.__version__}\n"


def test_help_lists_the_commands():
    assert set(_commands()) == {"generate", "prompt", "score", "autotune", "quantize", "eval", "info"}
    output = _output("--help")
    assert all(name in output for name in _commands())
    assert "--max-new-tokens" in _output("generate", "-h")


@pytest.mark.parametrize("name", ["generate", "prompt", "score", "autotune", "quantize", "eval perplexity", "info"])
def test_every_option_has_help(name):
    command, _, subcommand = name.partition(" ")
    found = _commands()[command]
    for param in (found.commands[subcommand] if subcommand else found).params:
        assert param.help, param.name
        assert param.help.endswith("."), param.help


def test_defaults_are_those_of_the_api():
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    defaults |= {
        name: parameter.default
        for name, parameter in inspect.signature(KoGPT.from_pretrained).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name != "progress"
    }
    for function in (cli.generate, cli.prompt_loop, cli.score):
        own = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
        shared = own.keys() & defaults.keys()
        assert {"dtype", "quant", "kv_dtype", "mesh"} <= shared
        assert {name: own[name] for name in shared} == {name: defaults[name] for name in shared}


@pytest.mark.parametrize("name", ["generate", "prompt", "score", "autotune"])
def test_dtypes_are_those_of_the_config(name):
    result = _invoke(name, "--dtype", "int4")
    _assert_refused(result, "--dtype", "int4", *DTYPES)


def test_no_command_prints_the_help():
    result = _invoke()
    assert result.exit_code == 2
    assert "generate" in result.output


def test_usage_errors_are_one_line():
    _assert_refused(_invoke("generate", "--max-tokens", "3"), "--max-tokens")
    _assert_refused(_invoke("generate", "--top-k", "many"), "--top-k", "integer")
    _assert_refused(_invoke("generat"), "generat")


def test_import_does_not_import_jax():
    # With an empty package in place of kogpt_jax itself: what its __init__ imports is another matter.
    code = (
        "import sys, types; package = types.ModuleType('kogpt_jax'); "
        f"package.__path__ = [{str(_ROOT / 'kogpt_jax')!r}]; sys.modules['kogpt_jax'] = package; "
        "import kogpt_jax.cli; print({'jax', 'numpy', 'sentencepiece'} & set(sys.modules))"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert completed.stdout == "set()\n"


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["--stream", "--no-stream", None])
def test_generate_prints_the_text(checkpoint, engine, stream):
    options = [] if stream is None else [stream]
    output = _output("generate", "--model", checkpoint, "--prompt", "이 영화는", "--max-new-tokens", 20, *options)
    assert output == engine.generate("이 영화는", SamplingParams(max_new_tokens=20))[0].text + "\n"


def test_generate_echoes_the_prompt(checkpoint):
    options = ["--model", checkpoint, "--prompt", "나는", "--max-new-tokens", 5]
    text = _output("generate", *options)
    assert (
        _output("generate", *options, "--echo") == _output("generate", *options, "--echo", "--stream") == "나는" + text
    )


def test_generate_several_prompts(checkpoint, engine):
    prompts = ["이 영화는", "나는", "서울은 대한민국의"]
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    options = ["--model", checkpoint, "--max-new-tokens", 5, "--max-batch-size", 2]
    texts = [completion.text for completion in engine.generate(prompts, SamplingParams(max_new_tokens=5))]
    assert _output("generate", *options, *arguments) == "".join(text + "\n" for text in texts)
    assert _output("generate", *options, stdin="\n".join(prompts)) == "".join(text + "\n" for text in texts)


def test_generate_json_lines(checkpoint, engine):
    prompts = ["이 영화는", "나는 오늘 학교에 갔다.", "The"]
    stdin = "".join(prompt + "\n" for prompt in prompts)
    options = ["--model", checkpoint, "--format", "jsonl", "--max-new-tokens", 5, "--max-batch-size", 2]
    records = _records(_output("generate", *options, stdin=stdin))
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=5))
    assert records == [
        {
            "index": index,
            "prompt": prompt,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "logprobs": pytest.approx(list(completion.logprobs), abs=1e-4),  # of another batch
            "finish_reason": completion.finish_reason,
            "usage": dataclasses.asdict(completion.usage),
        }
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def test_generate_options_reach_the_engine(checkpoint, engine):
    options = ["--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 7, "--ignore-eos"]
    params = SamplingParams(
        max_new_tokens=30, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, seed=7, ignore_eos=True
    )
    arguments = ["--model", checkpoint, "--prompt", "나는", "--max-new-tokens", 30, "--format", "jsonl"]
    (record,) = _records(_output("generate", *arguments, *options))
    assert tuple(record["token_ids"]) == engine.generate("나는", params)[0].token_ids
    assert len(record["token_ids"]) == 30


def test_generate_json_rows_with_their_own_options(checkpoint, engine):
    rows: list[dict[str, Any]] = [
        {"prompt": "나는", "temperature": 2, "seed": 1, "max_new_tokens": 12},
        {"prompt": "나는", "temperature": 2.0, "seed": 2, "top_k": 40, "top_p": 0.95, "min_p": 0},
        {"prompt": "나는\n\u2028오늘", "seed": None},
    ]
    stdin = "".join(json.dumps(row, ensure_ascii=row is rows[0]) + "\r\n" for row in rows)
    options = ["--model", checkpoint, "--format", "jsonl", "--max-new-tokens", 8, "--max-batch-size", 2]
    records = _records(_output("generate", *options, "--input-format", "jsonl", stdin=stdin))
    defaults = SamplingParams(max_new_tokens=8)
    params = [
        dataclasses.replace(defaults, **{key: value for key, value in row.items() if key != "prompt"}) for row in rows
    ]
    completions = engine.generate([row["prompt"] for row in rows], params)
    assert [record["prompt"] for record in records] == [row["prompt"] for row in rows]
    assert [tuple(record["token_ids"]) for record in records] == [completion.token_ids for completion in completions]
    assert len(records[0]["token_ids"]) == 12


def test_stdin_of_other_systems(checkpoint):
    options = ["--model", checkpoint, "--max-new-tokens", 4]
    plain = _output("generate", *options, stdin="나는\n오늘\n")
    assert _output("generate", *options, stdin="\ufeff나는\r\n오늘\r\n") == plain
    assert _output("generate", *options, stdin="나는\n오늘") == plain


def test_stats_go_to_stderr(checkpoint):
    options = ["--model", checkpoint, "--max-new-tokens", 40, "--ignore-eos", "--stats"]
    described = describe(KoGPT.from_pretrained(checkpoint).ops)
    for arguments in (["--prompt", "나는", "--stream"], ["--prompt", "나는", "--prompt", "오늘"]):
        result = _invoke("generate", *options, *arguments)
        assert result.exit_code == 0
        assert "tokens/s" not in result.stdout
        lines = dict(line.split(maxsplit=1) for line in result.stderr.splitlines())
        assert list(lines) == ["load", "first", "decode", "device", "ops"]
        assert lines["ops"] == described
        rate, unit, *rest = lines["decode"].split()
        assert float(rate) > 0
        assert unit == "tokens/s"
        assert rest == [f"({40 * arguments.count('--prompt')}", "tokens", "in", "all)"]
        assert lines["device"].startswith("cpu")
        assert lines["device"].endswith(", fp32")
    stderr = _invoke("generate", *options, "--prompt", "나는", "--kv-dtype", "int8").stderr
    assert ", fp32, int8 cache\n" in stderr


def test_clock_leaves_out_what_may_compile(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = cli._Clock()

    def events():
        # Two prompts: prefill, then three chunks; the second prompt ends with the second chunk.
        for seconds, index, count in [(10, 0, 1), (0, 1, 1), (5, 0, 8), (0, 1, 8), (2, 0, 8), (0, 1, 3), (1, 0, 8)]:
            now[0] += seconds
            yield kogpt_jax.StreamEvent(index, "", (5,) * count, (-1.0,) * count, None)

    assert len(list(clock.watch(events()))) == 7
    assert (clock._first_token_s, clock._num_tokens) == (10, 37)
    assert (clock._decode_tokens, clock._decode_s) == (19, 3)


def test_none_is_as_left_out(checkpoint):
    options = ["--model", checkpoint, "--prompt", "나는", "--max-new-tokens", 5]
    assert _output("generate", *options, "--quant", "none", "--kv-dtype", "none") == _output("generate", *options)


def test_int8_weights(checkpoint):
    options = ["--model", checkpoint, "--prompt", "나는", "--max-new-tokens", 5, "--quant", "w8a16"]
    (expected,) = KoGPT.from_pretrained(checkpoint, quant="w8a16", keep_quantized=False).generate(
        "나는", SamplingParams(max_new_tokens=5)
    )
    kept = json.loads(_output("info", "--json"))["quantized_cache"]
    for option in ("--no-keep-quantized", "--keep-quantized"):
        assert _output("generate", *options, option) == f"{expected.text}\n"
        now = json.loads(_output("info", "--json"))["quantized_cache"]
        assert now["models"] - kept["models"] == (option == "--keep-quantized")
    result = _invoke("score", "--model", checkpoint, "--text", "나는 오늘", "--quant", "w8a16", "--format", "jsonl")
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-new-tokens", "0"], ["max_new_tokens", "0"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-k", "-2"], ["top_k", "-2"]),
        (["--top-p", "0"], ["top_p", "0"]),
        (["--min-p", "1.5"], ["min_p", "1.5"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--quant", "w4a16"], ["--quant", "w4a16", "w8a16"]),
        (["--implementation", "cudnn"], ["--implementation", "cudnn", "reference"]),
        (["--kv-dtype", "fp8"], ["--kv-dtype", "fp8", "int8"]),
        (["--dtype", "fp32", "--kv-dtype", "bf16"], ["kv_dtype", "bf16", "fp32", "int8"]),
        (["--mesh", "d1p2t64"], ["mesh", "d1p2t64", "128 devices"]),
        (["--mesh", "2x2"], ["mesh", "2x2"]),
        (["--max-batch-size", "0"], ["--max-batch-size", "0"]),
        (["--input-format", "jsonl"], ["--input-format", "jsonl", "--prompt"]),
        (["--stream", "--format", "jsonl"], ["--stream", "jsonl"]),
        (["--stream", "--prompt", "또"], ["--stream", "2"]),
        (["--prompt", ""], ["--prompt 2", "empty"]),
        (["--prompt", "가" * (_MAX_LEN + 1)], ["--prompt 2", f"{_MAX_LEN}"]),
        (["--prompt", "\udcff"], ["--prompt 2", "U+DCFF"]),
    ],
)
def test_generate_refuses(checkpoint, arguments, named):
    _assert_refused(_invoke("generate", "--model", checkpoint, "--prompt", "나는", *arguments), *named)


@pytest.mark.parametrize(
    ("stdin", "named"),
    [
        ("", ["stdin is empty"]),
        ("나는\n\n오늘\n", ["stdin line 2", "blank"]),
        ("나는\n \t\n", ["stdin line 2", "blank"]),
        ("나는\n오늘\n".encode() + "한글".encode("euc-kr"), ["stdin line 3", "UTF-8", "0xc7"]),
        ("나는\n" + "가" * (_MAX_LEN + 1), ["stdin line 2", f"{_MAX_LEN}"]),
    ],
)
def test_generate_refuses_lines(checkpoint, stdin, named):
    _assert_refused(_invoke("generate", "--model", checkpoint, stdin=stdin), *named)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", ["JSON"]),
        ("[" * 100_000, ["JSON"]),
        ('["나는"]', ["object", "list"]),
        ("{}", ["'prompt'", "missing"]),
        ('{"prompt": 3}', ["prompt", "3"]),
        ('{"prompt": ""}', ["prompt", "empty"]),
        ('{"prompt": "\\ud800"}', ["U+D800"]),
        ('{"prompt": "a", "top_q": 1}', ["'top_q'"]),
        ('{"prompt": "a", "ignore_eos": true}', ["'ignore_eos'"]),
        ('{"prompt": "a", "top_k": 1.5}', ["top_k", "1.5"]),
        ('{"prompt": "a", "top_k": true}', ["top_k", "True"]),
        ('{"prompt": "a", "temperature": "hot"}', ["temperature", "'hot'"]),
        ('{"prompt": "a", "temperature": NaN}', ["temperature", "nan"]),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", ["temperature"]),
        ('{"prompt": "a", "seed": -1}', ["seed", "-1"]),
        ('{"prompt": "a", "max_new_tokens": null}', ["max_new_tokens", "None"]),
    ],
)
def test_generate_refuses_json_rows(checkpoint, line, named):
    stdin = '{"prompt": "나는"}\n' + line
    result = _invoke("generate", "--model", checkpoint, "--input-format", "jsonl", stdin=stdin)
    _assert_refused(result, "stdin line 2", *named)


@pytest.mark.parametrize("command", ["generate", "score", "prompt", "autotune", "info"])
def test_missing_model(tmp_path, command):
    path = tmp_path / "no\nmodel"  # the line feed stays out of the message
    _assert_refused(_invoke(command, "--model", path, stdin="나는\n"), str(tmp_path), "no\\nmodel")


def test_model_with_an_unfilled_key(checkpoint, tmp_path):
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    del tensors["lm_head.bias"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    _assert_refused(_invoke("generate", "--model", tmp_path, "--prompt", "나는"), str(tmp_path), "lm_head.bias")


def test_model_without_a_tokenizer(checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    for command in ("generate", "score"):
        _assert_refused(_invoke(command, "--model", tmp_path, stdin="나는\n"), str(tmp_path), "tokenizer")


def test_deterministic_mode_takes_a_seed_before_anything_is_written(checkpoint):
    lines = '{"prompt": "나는"}\n{"prompt": "너는", "temperature": 0.5}\n'
    result = _invoke("generate", "--model", checkpoint, "--deterministic", "--input-format", "jsonl", stdin=lines)
    _assert_refused(result, "stdin line 2 has temperature 0.5 and no seed", "--seed")


@pytest.mark.parametrize("command", ["generate", "prompt", "score"])
def test_deterministic_mode_reaches_the_model(checkpoint, command):
    """Which refuses it: no kernel takes heads of 16."""
    result = _invoke(command, "--model", checkpoint, "--deterministic", stdin="나는\n")
    _assert_refused(result, "deterministic cannot be used", "kernel")


@pytest.mark.parametrize("command", ["generate", "score"])
def test_logits_that_are_not_finite(checkpoint, tmp_path, command):
    """Finite weights whose products leave fp16's range: no bad input, so another exit code."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = {key: value.astype(np.float16) for key, value in hash_state_dict(config)}
    ffn_up = tensors["transformer.h.0.mlp.fc_in.weight"]
    ffn_up[:] = np.where(ffn_up > 0, 60000, -60000)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    _assert_refused(_invoke(command, "--model", tmp_path, stdin="나는\n"), "not finite", "fp16", "--nan-guard", code=1)
    guarded = _invoke(command, "--model", tmp_path, "--nan-guard", stdin="나는\n")
    _assert_refused(guarded, "not finite", "w_in of layer 0, in prefill at position", code=1)


def test_engine_errors_say_what_prompts_are_counted_from(checkpoint, monkeypatch):
    def stream_ids(self, prompt_ids, params):
        if prompt_ids[0] == self.tokenizer.encode("셋"):
            raise FloatingPointError("prompt 0: not finite")
        for index in range(len(prompt_ids)):
            yield kogpt_jax.StreamEvent(index, "글", (5,), (-1.0,), "length")

    monkeypatch.setattr(KoGPT, "stream_ids", stream_ids)
    result = _invoke("generate", "--model", checkpoint, "--max-batch-size", 2, stdin="하나\n둘\n셋\n")
    assert (result.exit_code, result.stdout) == (1, "글\n글\n")
    assert result.stderr == "kogpt: error: prompt 0: not finite (prompt 0 is stdin line 3)\n"


def test_other_exceptions_are_bugs_and_are_not_hidden(checkpoint, monkeypatch):
    monkeypatch.setattr(KoGPT, "from_pretrained", lambda *args, **kwargs: dict[str, KoGPT]()["missing"])
    with pytest.raises(KeyError):
        _invoke("generate", "--model", checkpoint, "--prompt", "나는")


# -- score ------------------------------------------------------------------------------------------------------------


def test_score_json_lines(checkpoint, engine):
    stdin = "".join(sentence + "\n" for sentence in _SENTENCES)
    options = ["--model", checkpoint, "--format", "jsonl", "--max-batch-size", 2]
    *records, total = _records(_output("score", *options, stdin=stdin))
    scores = engine.score(_SENTENCES)
    logprobs = []
    for index, (record, sentence, score) in enumerate(zip(records, _SENTENCES, scores, strict=True)):
        assert set(record) == {"index", "text", "perplexity", "token_ids", "logprobs"}
        assert (record["index"], record["text"]) == (index, sentence)
        assert tuple(record["token_ids"]) == score.token_ids
        assert record["perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
        assert record["logprobs"][0] is None
        logprobs += record["logprobs"][1:]
    tokens = sum(len(score.token_ids) for score in scores)
    perplexity = pytest.approx(math.exp(-np.mean(logprobs)), rel=1e-9)
    assert total == {"total": {"texts": len(_SENTENCES), "tokens": tokens, "perplexity": perplexity}}


def test_score_table(checkpoint, engine, tmp_path):
    long = "나는 오늘 " * 20
    file = tmp_path / "texts.txt"
    file.write_text(f"나는 오늘\n{long}\n", encoding="utf-8")
    output = _output("score", "--model", checkpoint, "--file", file)
    assert output == _output("score", "--model", checkpoint, "--text", "나는 오늘", "--text", long)
    header, first, second, total = [line.split(maxsplit=2) for line in output.splitlines()]
    assert header == ["perplexity", "tokens", "text"]
    scores = engine.score(["나는 오늘", long])
    assert first == [f"{scores[0].perplexity:.3f}", str(len(scores[0].token_ids)), "나는 오늘"]
    assert second[2].endswith("…")
    assert len(second[2]) <= 40
    assert total[1:] == [str(sum(len(score.token_ids) for score in scores)), "total of 2"]


def test_score_refuses(checkpoint, tmp_path):
    options = ["score", "--model", checkpoint]
    _assert_refused(_invoke(*options), "stdin is empty")
    _assert_refused(_invoke(*options, "--text", ""), "--text", "empty")
    _assert_refused(_invoke(*options, "--text", "a", "--file", tmp_path / "b"), "--text", "--file", str(tmp_path / "b"))
    _assert_refused(_invoke(*options, "--file", tmp_path / "missing"), str(tmp_path / "missing"), "No such file")
    _assert_refused(_invoke(*options, "--file", tmp_path), str(tmp_path), "directory")
    _assert_refused(_invoke(*options, "--text", "가" * (_MAX_LEN + 1)), "--text", f"{_MAX_LEN}")
    (tmp_path / "texts").write_bytes(b"fine\n\xff\n")
    _assert_refused(_invoke(*options, "--file", tmp_path / "texts"), f"{tmp_path / 'texts'} line 2", "0xff")


def test_score_needs_two_tokens(checkpoint, monkeypatch):
    monkeypatch.setattr(kogpt_jax.tokenizer.Tokenizer, "encode", lambda self, text: [5] * len(text))
    _assert_refused(_invoke("score", "--model", checkpoint, stdin="둘이\n일\n"), "stdin line 2", "at least 2", "1")


# -- autotune ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path, monkeypatch) -> Iterator[pathlib.Path]:
    """Where the times of these tests go, which are no other test's."""
    monkeypatch.setattr(autotune, "_user_folder", tmp_path / "tuned")
    yield tmp_path / "tuned"
    autotune._load_table.cache_clear()


@pytest.mark.host
def test_autotune(checkpoint, tuned):
    """From the model's sizes to a file that a later start takes its choice from."""
    output = _output("autotune", "--model", checkpoint, "--dtype", "fp32", "--rows", 66, "--rows", 100)
    header, *lines = output.splitlines()
    assert header.split()[:5] == ["op", "dtype", "outputs", "K", "rows"]
    rows = [line.split() for line in lines[:2]]
    # w_in and w_out of D = 32, F = 64.
    sizes = [["mixed_gemm", "float32", "160", "32", "128"], ["mixed_gemm", "float32", "32", "96", "128"]]
    assert [row[:5] for row in rows] == sizes
    assert all(row[6] == "reference" and row[8] in ("reference", "linear") for row in rows)
    assert all(0 < float(row[7]) <= float(row[5]) for row in rows)
    (path,) = tuned.iterdir()
    assert lines[-1] == f"kept in {path}"
    table = autotune.load_table("cpu")
    assert sorted((key.num_outputs, key.k_dim, key.rows) for key in table) == [(32, 96, 128), (160, 32, 128)]
    assert all({timed.choice.implementation for timed in entry} == {"reference", "linear"} for entry in table.values())
    config = dataclasses.replace(kogpt_jax.checkpoint.load_config(checkpoint, dtype="fp32"), quant="w8a16")
    chosen = resolve_ops(config, "auto", platform="cpu")
    assert lines[2] == f"auto with w8a16 in fp32: {describe(chosen)}"
    assert lines[3].startswith("auto with w8a8 in fp32: ")
    (report,) = _records(_output("info", "--json"))
    assert report["ops"]["timed"]["products"] == 2
    assert "timed products" in _output("info")


@pytest.mark.host
def test_autotune_says_what_is_wrong_and_takes_the_other(checkpoint, tuned, monkeypatch):
    """`linear` a tenth too large."""
    real = kogpt_jax.model._linear_in_groups

    def wrong(*args, **kwargs):
        y, act = real(*args, **kwargs)
        return 1.1 * y, act

    monkeypatch.setattr(kogpt_jax.model, "_linear_in_groups", wrong)
    result = _invoke("autotune", "--model", checkpoint, "--dtype", "fp32", "--rows", "70", "--quant", "w8a16")
    assert result.exit_code == 0
    said = result.stderr.splitlines()
    assert len(said) == 2
    assert all("mixed_gemm at 128 rows: linear is left out: error 0.1" in line for line in said)
    table = autotune.load_table("cpu")
    assert [[timed.choice.implementation for timed in entry] for entry in table.values()] == [["reference"]] * 2
    assert "INT8 products of prefill and scoring reference" in result.stdout


def test_autotune_takes_each_bucket_of_rows_once(monkeypatch):
    """And one product after the other, whose weights are made once."""
    monkeypatch.setattr(tuning, "gemm_implementations", lambda config, **_: ("reference", "linear"))
    configs = tuning.load_configs(None, "kogpt-6b", None, ["w8a16"])
    problems = tuning.make_problems(configs, [2040, 16, 9, 8192], platform="cpu", num_shards=2)
    keys = [dataclasses.astuple(problem.key) for problem in problems]
    sizes = [(14336, 4096), (4096, 10240)]
    assert keys == [("mixed_gemm", "bfloat16", *size, rows) for size in sizes for rows in (8192, 2048, 16)]
    assert [(problem.num_plain, problem.act_dim) for problem in problems] == [(6144, 10240)] * 3 + [(None, None)] * 3


@pytest.mark.host
def test_autotune_draws_a_bar_on_a_terminal_only(checkpoint, tuned, monkeypatch, capsys):
    configs = tuning.load_configs(str(checkpoint), None, "fp32", ["w8a16"])
    problems = tuning.make_problems(configs, [128], platform="cpu")
    tuning.tune_products(problems, platform="cpu", progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    tuning.tune_products(problems, platform="cpu", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "mixed_gemm float32 160 x 32, 128 rows" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rows", "0"], ["--rows", "0"]),
        (["--model", "some", "--shape", "demo"], ["--model some", "--shape demo"]),
        (["--quant", "w8a8"], ["nothing to measure", "w8a8 in fp16", "cpu"]),
        (["--shape", "gpt"], ["--shape", "gpt"]),
        (["--quant", "none"], ["--quant", "none"]),
        (["--mesh", "4"], ["d1p1t1", "4"]),
        (["--mesh", "d1p1t3"], ["num_heads", "3 tensor shards"]),
    ],
)
def test_autotune_refuses(arguments, named, tuned):
    _assert_refused(_invoke("autotune", *arguments), *named)
    assert not tuned.exists()


@pytest.mark.host
def test_autotune_where_nothing_can_be_written(checkpoint, tuned):
    tuned.write_text("a file in the folder's place")
    arguments = ["--model", checkpoint, "--dtype", "fp32", "--rows", "16", "--quant", "w8a16"]
    _assert_refused(_invoke("autotune", *arguments), "cannot be kept", str(tuned))


# -- quantize and eval ------------------------------------------------------------------------------------------------


@pytest.fixture
def calibration(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "calibration.txt"
    path.write_text("\n".join(_SENTENCES) + "\n", encoding="utf-8")
    return path


def test_quantize_makes_what_the_others_take(checkpoint, calibration, monkeypatch):
    result = _invoke("quantize", "--model", checkpoint, "--calibration", calibration)
    assert result.exit_code == 0
    assert result.stderr.startswith("For this machine only: ")
    head, *products, entry = result.stdout.splitlines()
    assert head.split() == ["layer", "product", "strength", "error", "without"]
    assert [product.split()[:2] for product in products] == [["0", "w_in"], ["0", "w_out"]]
    for product in products:
        strength, error, without = map(float, product.split()[2:])
        assert 0 <= strength < 1
        assert 0 < error <= without
    assert pathlib.Path(entry, "smoothing.json").is_file()
    monkeypatch.setattr(smoothing, "make_leaves", None)  # nothing is made any more
    options = ["--model", checkpoint, "--prompt", "나는", "--max-new-tokens", 5, "--quant", "w8a8"]
    result = _invoke("generate", *options, "--calibration", calibration, "--stats")
    assert result.exit_code == 0
    assert f"with w8a8 weights, smoothed on {calibration}" in result.stderr
    plain = _invoke("generate", *options, "--stats")
    assert "smoothed" not in plain.stderr
    assert _invoke("quantize", "--model", checkpoint).stdout.splitlines()[-1] != entry


def test_quantize_without_calibration(checkpoint):
    result = _invoke("quantize", "--model", checkpoint, "--quant", "w8a16")
    (entry,) = result.stdout.splitlines()
    assert json.loads(pathlib.Path(entry, "config.json").read_text())["quantization_config"]["scheme"] == "w8a16"
    refused = _invoke("quantize", "--model", checkpoint, "--quant", "w8a16", "--calibration", "text.txt")
    _assert_refused(refused, "calibration text.txt is for quant w8a8, got quant w8a16")


def test_eval_perplexity(checkpoint, calibration, tmp_path):
    file = tmp_path / "result.json"
    options = ["--model", checkpoint, "--text", calibration, "--lines", "--window", 16, "--json", file]
    options += ["--calibration", calibration, "--dtype", "fp32"]
    first = _invoke("eval", "perplexity", *options, "--modes", "fp32,w8a8-smoothed")
    assert (first.exit_code, first.stderr) == (0, "")
    title, head, *rows = first.stdout.splitlines()
    assert "calibration.txt" in title
    assert head.split() == ["mode", "phase", "perplexity", "change", "%", "logit", "error", "agreement", "tokens/s"]
    names = [(mode, phase) for mode in ("fp32", "w8a8-smoothed") for phase in ("prefill", "decode")]
    assert [tuple(row.split()[:2]) for row in rows] == names
    result = json.loads(file.read_text())
    assert result["settings"]["window"] == 16
    assert result["settings"]["stride"] == 8
    assert {"commit", "versions", "device"} <= result["environment"].keys()
    for row in rows:
        mode, phase, perplexity, *_ = row.split()
        assert float(perplexity) == pytest.approx(result["modes"][mode][phase]["perplexity"], abs=1e-3)
    again = _invoke("eval", "perplexity", *options, "--modes", "fp32,w8a8-smoothed")
    assert (again.stdout, again.stderr) == (first.stdout, f"kogpt: taken from {file}: fp32, w8a8-smoothed\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--modes", "fp32,w4a16"], ["mode", "'w4a16'", "w8a8-smoothed"]),
        (["--modes", "w8a8-smoothed"], ["w8a8-smoothed", "calibration"]),
        (["--window", 1], ["window", "1"]),
        (["--outliers", 0.5], ["outliers", "0.5"]),
        (["--plot", "figure.nothing"], ["figure.nothing"]),
        (["--text", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_what_eval_refuses(checkpoint, calibration, arguments, named):
    result = _invoke("eval", "perplexity", "--model", checkpoint, "--text", calibration, *arguments)
    _assert_refused(result, *named)


# -- info -------------------------------------------------------------------------------------------------------------


def test_info_json(checkpoint, engine):
    (report,) = _records(_output("info", "--model", checkpoint, "--json"))
    assert set(report) == {"model", "versions", "devices", "settings", "cache_dir", "ops", "quantized_cache"}
    assert set(report["versions"]) == {"kogpt_jax", "jax", "jaxlib", "flax", "numpy", "python"}
    assert report["versions"]["kogpt_jax"] == kogpt_jax.__version__
    assert report["devices"][0]["platform"] == "cpu"
    assert report["settings"] == [setting._asdict() for setting in kogpt_jax.runtime.settings()]
    assert report["cache_dir"] == os.environ["KOGPT_CACHE_DIR"]
    assert [library["name"] for library in report["ops"]["libraries"]] == ["host", "cuda"]
    assert report["ops"]["jaxlib_ffi_version"] == list(custom_ops.jaxlib_ffi_version() or ())
    assert set(report["ops"]["auto"]) == {"fp32", "fp16", "bf16", "w8a16", "w8a8", "int8 cache"}
    device = autotune.find_device("cpu")
    timed = None if device is None else {"device": device.name, "products": len(autotune.load_table("cpu"))}
    assert report["ops"]["timed"] == timed
    assert report["ops"]["auto"]["fp32"] == describe(engine.ops)
    kept = report["quantized_cache"]
    assert pathlib.Path(kept["directory"]).parent == pathlib.Path(report["cache_dir"])
    assert {kept["models"], kept["bytes"]} == {0} or min(kept["models"], kept["bytes"]) > 0
    model = report["model"]
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    num_params = sum(tensor.size for tensor in tensors.values())
    assert model["num_params"] == num_params
    matrices = {key: tensor for key, tensor in tensors.items() if tensor.ndim == 2 and "wte" not in key}
    num_int8, num_scales = sum(tensor.size for tensor in matrices.values()), sum(map(len, matrices.values()))
    num_scales -= len(tensors["transformer.ln_f.weight"])  # attention's and the FFN's outputs share theirs
    assert model["weight_bytes"] == {
        "fp32": 4 * num_params,
        "fp16": 2 * num_params,
        "bf16": 2 * num_params,
        "w8a16": num_int8 + 4 * num_scales + 2 * (num_params - num_int8),
    }
    # Keys and values of 32 numbers a token in the only layer.
    assert model["kv_cache_bytes_per_row"] == {
        "fp32": 256 * _MAX_LEN,
        "fp16": 128 * _MAX_LEN,
        "bf16": 128 * _MAX_LEN,
        "int8": (64 + 4 * 4) * _MAX_LEN,  # and scales of two heads
    }
    assert model["config"] == json.loads(json.dumps(dataclasses.asdict(engine.config)))
    assert model["tokenizer"]["file"] == str(checkpoint / "tokenizer.model")
    assert model["tokenizer"]["special_ids"] == {"bos": 0, "eos": 1, "unk": 2, "pad": 3, "mask": None}


def test_info_text(checkpoint):
    output = _output("info", "--model", checkpoint)
    for fact in (
        "jaxlib",
        "cpu",
        "jax_compilation_cache_dir",
        "fp32",
        "parameters",
        "host library",
        "cuda library",
        "ops with w8a16",
        "ops with w8a8",
        str(checkpoint / "tokenizer.model"),
    ):
        assert fact in output
    assert str(checkpoint) not in _output("info")


# -- prompt -----------------------------------------------------------------------------------------------------------


def _expected(engine: KoGPT, prompt: str, max_length: int) -> str:
    params = SamplingParams(max_new_tokens=max_length - _num_tokens(engine, prompt))
    return f"{prompt}{engine.generate(prompt, params)[0].text}\n"


def _num_tokens(engine: KoGPT, text: str) -> int:
    assert engine.tokenizer is not None
    return len(engine.tokenizer.encode(text))


def test_prompt_loop_through_a_pipe(checkpoint, engine):
    stdin = "나는\n0\n12\n오늘은\n0\n20\n"
    result = _invoke("prompt", "--model", checkpoint, stdin=stdin)
    assert result.exit_code == 0
    assert result.stdout == _expected(engine, "나는", 12) + _expected(engine, "오늘은", 20)
    assert result.stderr.split() == ["prompt>", "temperature(0.8)>", "max_length(128)>"] * 2 + ["prompt>"]


def test_prompt_loop_takes_defaults(checkpoint, engine):
    options = ["prompt", "--model", checkpoint, "--seed", 3, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.001]
    length = 128 - _num_tokens(engine, "나는")
    params = SamplingParams(max_new_tokens=length, temperature=0.8, seed=3, top_k=40, top_p=0.9, min_p=0.001)
    expected = "나는" + engine.generate("나는", params)[0].text + "\n"
    for stdin in ("나는\n\n\n", "나는\r\n\r\n\r\n", "나는"):  # Enter, or the pipe has ended
        assert _invoke(*options, stdin=stdin).stdout == expected


def test_prompt_loop_asks_again(checkpoint, engine, monkeypatch):
    monkeypatch.setattr(cli, "_is_terminal", lambda stream: stream is sys.stdin)  # a user whose stdout is redirected
    stdin = "\n  \n" + "가" * (_MAX_LEN + 1) + "\n나는\nhot\n-1\n0\nlong\n1\n12\n"
    result = _invoke("prompt", "--model", checkpoint, stdin=stdin)
    assert result.exit_code == 0
    assert result.stdout == _expected(engine, "나는", 12)
    errors = [line for line in result.stderr.splitlines() if "kogpt: error: " in line]  # after the question
    for line, named in zip(
        errors,
        ["prompt is empty", "prompt is empty", f"{_MAX_LEN}", "'hot'", "-1", "'long'", "max_length must be more than"],
        strict=True,
    ):
        assert named in line


@pytest.mark.parametrize(
    ("stdin", "named"),
    [
        ("\n0.8\n64\n오늘은\n0\n20\n", "prompt is empty"),
        ("오늘은\nabc\n20\n내일은\n0\n20\n", "temperature must be a number, got 'abc'"),
        ("오늘은\n0\nabc\n내일은\n0\n20\n", "max_length must be an integer, got 'abc'"),
    ],
)
def test_prompt_loop_ends_at_a_bad_line_of_a_pipe(checkpoint, engine, stdin, named):
    """Nobody is there to be asked again, and to go on would take later lines for answers to other questions."""
    result = _invoke("prompt", "--model", checkpoint, stdin="나는\n0\n12\n" + stdin)
    assert (result.exit_code, result.stdout) == (2, _expected(engine, "나는", 12))
    assert [line for line in result.stderr.splitlines() if "error" in line] == [f"kogpt: error: {named}"]


def test_prompt_loop_ends_where_a_pipe_leaves_no_way_on(checkpoint):
    # The default of max_length does not hold this prompt, and nobody is there to be asked again.
    result = _invoke("prompt", "--model", checkpoint, stdin="가" * 200 + "\n0\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("kogpt: error: max_length must be more than")
    result = _invoke("prompt", "--model", checkpoint, stdin="한글\n".encode("euc-kr"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "stdin is not UTF-8" in result.stderr


# -- Processes of their own -------------------------------------------------------------------------------------------


def test_pipe_in_pipe_out(checkpoint, engine):
    # UTF-8, whatever Python would take for these streams.
    options = ["--model", checkpoint, "--format", "jsonl", "--max-new-tokens", 5]
    completed = _run("generate", *options, stdin="나는\n오늘\n", PYTHONIOENCODING="latin-1")
    assert (completed.returncode, completed.stderr) == (0, "")
    texts = [completion.text for completion in engine.generate(["나는", "오늘"], SamplingParams(max_new_tokens=5))]
    assert [record["text"] for record in _records(completed.stdout)] == texts


def test_reader_that_goes_away(checkpoint):
    kogpt = f"'{sys.executable}' -m kogpt_jax generate --model '{checkpoint}' --max-new-tokens 2 --max-batch-size 1"
    script = f"yes 나는 | head -n 300 | {kogpt} --format jsonl | head -n 1; echo ${{PIPESTATUS[2]}}"
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    completed = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    first, status = completed.stdout.splitlines()
    assert json.loads(first)["index"] == 0
    assert status == "141"
    assert completed.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full, _start("--version", stdout=full) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == "kogpt: error: stdout cannot be written: No space left on device\n"


def test_bad_input_has_no_traceback(tmp_path):
    _assert_refused(_run("generate", "--model", tmp_path / "missing", "--prompt", "나는"), str(tmp_path / "missing"))


@pytest.mark.slow
def test_closed_streams(checkpoint):
    kogpt = f"'{sys.executable}' -m kogpt_jax generate --model '{checkpoint}' --max-new-tokens 2"
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    for redirection, line in (("<&-", "no text given"), ("--prompt 나는 >&-", "stdout is closed")):
        completed = subprocess.run(
            f"{kogpt} {redirection}", shell=True, env=environment, capture_output=True, text=True, timeout=120
        )
        _assert_refused(completed, line, code=2 if line.startswith("no text") else 1)


def test_closed_stderr(checkpoint):
    """Nothing can be told then, but results and exit codes are as ever."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    generate = f"generate --model '{checkpoint}' --stats --max-new-tokens 2"
    prompt = f"prompt --model '{checkpoint}' --seed 1"
    for arguments, stdin, code, num_lines in (
        (f"{generate} --prompt 나는", "", 0, 1),
        (f"{generate} --top-p 2 --prompt 나는", "", 2, 0),
        (f"{generate} --unheard-of", "", 2, 0),
        (prompt, "나는\n0\n12\n", 0, 1),
    ):
        completed = subprocess.run(
            f"'{sys.executable}' -m kogpt_jax {arguments} 2>&-",
            shell=True,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        assert (completed.returncode, completed.stdout.count("\n")) == (code, num_lines), completed.stdout
        assert "error" not in completed.stdout
        assert "prompt>" not in completed.stdout


def test_interrupt(checkpoint):
    options = ["--prompt", "나는", "--stream", "--ignore-eos", "--echo", "--max-new-tokens", _MAX_LEN]
    with _start("generate", "--model", checkpoint, *options) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == "나"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "")


def test_prompt_loop_on_a_terminal(checkpoint):
    """Questions, Ctrl-C that stops one text only, Ctrl-D that ends."""
    terminal, inner = pty.openpty()
    process = _start("prompt", "--model", checkpoint, stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    seen = b""

    def expect(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    seen += os.read(terminal, 4096)
                except OSError:
                    pytest.fail(seen.decode(errors="replace"))
        seen = seen.partition(text.encode())[2]

    with process:
        try:
            expect("prompt> ")
            os.write(terminal, "나는\n".encode())
            expect("temperature(0.8)> ")
            os.write(terminal, b"warm\n")
            expect("temperature must be a number, got 'warm'")
            expect("temperature(0.8)> ")
            os.write(terminal, b"\n")
            expect("max_length(128)> ")
            os.write(terminal, f"{_MAX_LEN}\n".encode())
            expect("나는")
            process.send_signal(signal.SIGINT)
            expect("prompt> ")
            os.write(terminal, b"\x04")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(terminal)
    assert b"Traceback" not in seen
