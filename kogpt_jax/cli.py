"""The ``kogpt`` command: results on stdout, everything else on stderr.

Exit codes: 0; 1 a model whose logits are not finite, or an output that cannot be written; 2 bad input, in one line that
names it; 130 Ctrl-C; 141 the reader of a pipe went away. Anything else is a bug and shows its traceback.

All input is read and checked before a model is loaded, and tokenised before anything is printed: a bad line 5000 does
not leave 4999 results behind. Text is UTF-8 on both sides, whatever the locale says.

This module imports nothing that imports JAX, which takes a second: ``kogpt --help`` must not wait for it.
"""

import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NoReturn, TextIO, TypeVar, cast

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

import kogpt_jax
from kogpt_jax._version import __version__
from kogpt_jax.errors import InputError
from kogpt_jax.text_rows import TextRow, argument_rows, decode_utf8, json_row, line_rows, stdin_rows

_T = TypeVar("_T")

# The defaults of the original `python -m kogpt`.
_PROMPT_TEMPERATURE = "0.8"
_PROMPT_MAX_LENGTH = "128"

_SHOWN_CHARS = 40  # of a text in a table


# -- Options that several commands share ------------------------------------------------------------------------------

_Dtype = Literal["fp32", "fp16", "bf16"]
_QuantMode = Literal["none", "w8a16", "w8a8"]
_KvDtypeName = Literal["none", "fp32", "fp16", "bf16", "int8"]
_Choice = Literal["auto", "ffi", "reference"]
_Model = Annotated[
    str, typer.Option("--model", "-m", metavar="DIR", help="Hugging Face directory, or 'demo' for the shipped model.")
]
_DtypeOption = Annotated[_Dtype | None, typer.Option(help="Dtype to run in; as the weights are stored if not given.")]
_Quant = Annotated[
    _QuantMode,
    typer.Option(
        help="Quantisation: w8a16 holds the weight matrices in INT8, at half the size; w8a8 also reads prompts and "
        "scores texts with INT8 activations, and decodes with them on Hopper GPUs."
    ),
]
_Calibration = Annotated[
    pathlib.Path | None,
    typer.Option(
        metavar="FILE",
        help="Text, one document a line, on which --quant w8a8 smooths the weights (SmoothQuant); must be named each "
        "time. Made once and kept, see kogpt quantize.",
    ),
]
_KeepQuantized = Annotated[
    bool,
    typer.Option(
        "--keep-quantized/--no-keep-quantized",
        help="Keep quantised weights in the cache folder (kogpt info names it), and take them from there.",
    ),
]
_Implementation = Annotated[
    _Choice,
    typer.Option(help="What runs the model: ffi (this project's kernels), reference (XLA), or the faster one."),
]
_KvDtype = Annotated[
    _KvDtypeName | None,
    typer.Option(help="Dtype of the KV cache: int8, or the model's ('none' or its name), which is the default."),
]
_Mesh = Annotated[
    str,
    typer.Option(
        help="Devices along three axes, such as d2p1t4: data (shares the texts), pipe (the layers), tensor (the heads "
        "and the FFN)."
    ),
]
_Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Run as one of several processes, all started with the same options: where process 0 serves the others. "
        "'auto': as JAX_COORDINATOR_ADDRESS or Slurm says. Process 0 reads the texts and prints.",
    ),
]
_NumProcesses = Annotated[
    int | None,
    typer.Option(help="Of --coordinator: how many; as JAX_NUM_PROCESSES, Open MPI or Slurm says if not given."),
]
_ProcessId = Annotated[
    int | None,
    typer.Option(help="Of --coordinator: which one, from 0; as JAX_PROCESS_ID, Open MPI or Slurm says if not given."),
]
_NanGuard = Annotated[
    bool,
    typer.Option("--nan-guard", help="Where logits are not finite, name the first layer and op that was not. Slow."),
]
_Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same result for a text, bit for bit, whatever runs beside it. Slower: every batch is computed as one "
        "of --max-batch-size.",
    ),
]
_MaxBatchSize = Annotated[int, typer.Option(help="Texts that run together at most, 1 or more.")]
_Temperature = Annotated[
    float, typer.Option(help="0 takes the most likely token; larger is more varied. Finite, 0 or more.")
]
_TopK = Annotated[int, typer.Option(help="Sample from the k most likely tokens. 0 or more; 0 is off.")]
_TopP = Annotated[
    float,
    typer.Option(help="Sample from the likeliest tokens that together reach this probability. Above 0, up to 1."),
]
_MinP = Annotated[
    float,
    typer.Option(help="Sample from tokens with this share of the likeliest's probability. 0 to 1; 0 is off."),
]
_Seed = Annotated[
    int | None,
    typer.Option(help="Makes sampling repeatable; for every prompt. 0 to 4294967295; drawn if not given."),
]


_process_id: int | None = None  # of several processes


class _Commands(TyperGroup):
    """The group of commands, ending as the module says: for the console script and for tests alike."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        code = 0
        try:
            # Typer makes 130 of a KeyboardInterrupt and returns the status of an Exit.
            code = super().main(*args, **{**kwargs, "standalone_mode": False}) or 0
        except TyperException as error:
            message = error.format_message()  # empty where the help has been printed instead
            if message:
                _complain(message)
            code = error.exit_code
        except InputError as error:
            _complain(error)
            code = 2
        except FloatingPointError as error:
            _complain(error)
            code = 1
        except SystemExit as error:
            code = cast(int, error.code)
        if code and _process_id is not None:
            from kogpt_jax import distributed

            distributed.leave(code)
        sys.exit(code)


app = typer.Typer(
    cls=_Commands,
    help="Continue and score Korean text with KoGPT (GPT-J architecture).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain columns: boxes leave the help texts too little room
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    app(prog_name="kogpt")


def _print_version(is_asked: bool) -> bool:
    if is_asked:
        _emit(f"kogpt {__version__}\n")
        raise typer.Exit
    return is_asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# -- kogpt generate ---------------------------------------------------------------------------------------------------


@app.command()
def generate(
    model: _Model = "demo",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Text to continue; may be repeated. Without it: lines of stdin."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to add at most, 1 or more; the context may end before.")
    ] = 64,
    temperature: _Temperature = 0.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    seed: _Seed = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    dtype: _DtypeOption = None,
    quant: _Quant = "none",
    calibration: _Calibration = None,
    keep_quantized: _KeepQuantized = True,
    kv_dtype: _KvDtype = None,
    mesh: _Mesh = "d1p1t1",
    coordinator: _Coordinator = None,
    num_processes: _NumProcesses = None,
    process_id: _ProcessId = None,
    max_batch_size: _MaxBatchSize = 64,
    implementation: _Implementation = "auto",
    nan_guard: _NanGuard = False,
    deterministic: _Deterministic = False,
    input_format: Annotated[
        Literal["text", "jsonl"],
        typer.Option(
            help='Of stdin: a prompt a line, or a JSON object a line with "prompt" and, of the options above, '
            '"max_new_tokens", "temperature", "top_k", "top_p", "min_p" and "seed" for this prompt alone.'
        ),
    ] = "text",
    output_format: Annotated[
        Literal["text", "jsonl"],
        typer.Option("--format", help="Of stdout: texts, or a JSON object a line with token ids and finish reason."),
    ] = "text",
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before its text.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the text as it grows; one prompt and --format text only. Default: on if stdout is a terminal.",
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print times (s), tokens/s and the device on stderr.")] = False,
) -> None:
    """Continue prompts.

    Prompts come from --prompt or, to its end, from stdin; results come in the same order, batch after batch.
    """
    # Before the input is read and long before weights are: a wrong option is told at once.
    params = kogpt_jax.SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    rows = _rows_of_all(lambda: _prompt_rows(prompt, input_format), coordinator, num_processes, process_id)
    row_params = [_with_options(params, row) for row in rows]
    for row, of_row in zip(rows, row_params, strict=True):
        _check_seed(of_row, row.where, deterministic)
    can_stream = len(rows) == 1 and output_format == "text"
    if stream and not can_stream:
        raise InputError(f"--stream takes one prompt and --format text, got {len(rows)} and {output_format}")
    clock = _Clock()
    engine = _load(
        model,
        dtype,
        quant,
        calibration,
        keep_quantized,
        kv_dtype,
        mesh,
        max_batch_size,
        implementation,
        nan_guard,
        deterministic,
    )
    clock.loaded()
    prompt_ids = [_encode(engine, row) for row in rows]

    if can_stream and (_is_terminal(sys.stdout) if stream is None else stream):
        _emit(rows[0].text if echo else "")
        for event in clock.watch(engine.stream_ids(prompt_ids, row_params)):
            _emit(event.text or "")
        _emit("\n")
    else:
        for index, result in _in_batches(engine, rows, prompt_ids, row_params, clock):
            text = "".join(result.texts)
            if output_format == "jsonl":
                _emit_json(
                    {
                        "index": index,
                        "prompt": rows[index].text,
                        "text": text,
                        "token_ids": result.token_ids,
                        "logprobs": result.logprobs,
                        "finish_reason": result.finish_reason,
                        "usage": {
                            "prompt_tokens": len(prompt_ids[index]),
                            "completion_tokens": len(result.token_ids),
                        },
                    }
                )
            else:
                _emit((rows[index].text if echo else "") + text + "\n")
    if stats and not _process_id:
        clock.report(engine, calibration)


@dataclasses.dataclass
class _Result:
    """A completion that is growing."""

    texts: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


def _in_batches(
    engine: "kogpt_jax.KoGPT",
    rows: Sequence[TextRow],
    prompt_ids: Sequence[list[int]],
    params: Sequence["kogpt_jax.SamplingParams"],
    clock: "_Clock",
) -> Iterator[tuple[int, _Result]]:
    """Indices and results in input order, a batch at a time: what has been printed is safe whatever comes later."""
    for first in range(0, len(rows), engine.max_batch_size):
        batch = slice(first, first + engine.max_batch_size)
        results = [_Result() for _ in rows[batch]]
        try:
            for event in clock.watch(engine.stream_ids(prompt_ids[batch], params[batch])):
                result = results[event.index]
                result.texts.append(event.text or "")
                result.token_ids += event.token_ids
                result.logprobs += event.logprobs
                result.finish_reason = event.finish_reason
        except (InputError, FloatingPointError) as error:
            raise type(error)(_counted_from(error, rows, first)) from error
        yield from enumerate(results, first)


def _counted_from(error: Exception, rows: Sequence[TextRow], first: int) -> str:
    """An error of the engine, which counts the prompts of a call from 0, with what it counts from."""
    return str(error) if len(rows) == 1 else f"{error} (prompt 0 is {rows[first].where})"


class _Clock:
    """Times of one command.

    The decode rate leaves out prefill and the first chunk of each batch, in whose time programs may be compiled.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._load_s = 0.0
        self._first_token_s: float | None = None
        self._num_tokens = 0
        self._decode_tokens = 0
        self._decode_s = 0.0

    def loaded(self) -> None:
        self._load_s = time.perf_counter() - self._start

    def watch(self, events: Iterator["kogpt_jax.StreamEvent"]) -> Iterator["kogpt_jax.StreamEvent"]:
        """Passes events of one call on and times them."""
        start = previous = time.perf_counter()
        num_events: collections.Counter[int] = collections.Counter()  # of each prompt
        for event in events:
            now = time.perf_counter()
            if self._first_token_s is None:
                self._first_token_s = now - start
            self._num_tokens += len(event.token_ids)
            num_events[event.index] += 1
            if num_events[event.index] > 2:
                self._decode_tokens += len(event.token_ids)
                self._decode_s += now - previous
            previous = now
            yield event

    def report(self, engine: "kogpt_jax.KoGPT", calibration: pathlib.Path | None) -> None:
        """Prints the times on stderr."""
        from kogpt_jax.ops import describe  # here, so that --help need not import JAX
        from kogpt_jax.sharding import mesh_name

        device = engine.mesh.devices.flat[0]
        stats = [device.memory_stats() or {} for device in engine.mesh.local_devices]
        peaks = [memory["peak_bytes_in_use"] for memory in stats if "peak_bytes_in_use" in memory]
        peak = f", peak memory {max(peaks) / 2**30:.2f} GiB" if peaks else ""  # of the fullest device
        rate = f"{self._decode_tokens / self._decode_s:.1f} tokens/s" if self._decode_tokens else "too short to time"
        config = engine.config
        dtype = config.dtype if config.quant == "none" else f"{config.dtype} with {config.quant} weights"
        dtype += "" if config.kv_dtype is None else f", {config.kv_dtype} cache"
        dtype += f", smoothed on {calibration}" if config.has_multiplier else ""
        lines = [
            f"load         {self._load_s:.2f} s",
            f"first token  {self._first_token_s or 0.0:.2f} s, compilation included",
            f"decode       {rate} ({self._num_tokens} tokens in all)",
            f"device       {device.platform} {device.device_kind}, mesh {mesh_name(engine.mesh)}, {dtype}{peak}",
            f"ops          {describe(engine.ops)}",
        ]
        _tell("\n".join(lines) + "\n")


# -- kogpt prompt -----------------------------------------------------------------------------------------------------


@app.command("prompt")
def prompt_loop(
    model: _Model = "demo",
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    seed: _Seed = None,
    dtype: _DtypeOption = None,
    quant: _Quant = "none",
    calibration: _Calibration = None,
    keep_quantized: _KeepQuantized = True,
    kv_dtype: _KvDtype = None,
    mesh: _Mesh = "d1p1t1",
    implementation: _Implementation = "auto",
    nan_guard: _NanGuard = False,
    deterministic: _Deterministic = False,
) -> None:
    """Ask for prompts and continue them, one after the other.

    Asks for a prompt, a temperature and the length in tokens of prompt and continuation together; Enter takes the
    default. Ctrl-C stops a text, Ctrl-D ends. In a pipe the answers come one a line, those missing at its end are the
    defaults, and a bad one ends the command.
    """
    filters = kogpt_jax.SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    engine = _load(
        model, dtype, quant, calibration, keep_quantized, kv_dtype, mesh, 1, implementation, nan_guard, deterministic
    )
    has_user = _is_terminal(sys.stdin)
    if has_user:
        with contextlib.suppress(ImportError):  # line editing; Python can be built without
            import readline  # noqa: F401
    while (text := _ask("prompt> ")) is not None:
        try:
            if not text.strip():
                raise InputError("prompt is empty")
            prompt_ids = _encode(engine, TextRow("prompt", text))
        except InputError as error:
            if not has_user:  # the next line is no prompt: it answers the question after this one
                raise
            _complain(error)
            continue
        try:
            params = _ask_params(filters, len(prompt_ids))
        except EOFError:
            return
        try:
            _check_seed(params, "prompt", deterministic)
            _emit(text)
            for event in engine.stream_ids([prompt_ids], params):
                _emit(event.text or "")
        except KeyboardInterrupt:
            if not has_user:
                raise
        except InputError as error:
            if not has_user:
                raise
            _complain(error)
        _emit("\n")


def _check_seed(params: "kogpt_jax.SamplingParams", where: str, deterministic: bool) -> None:
    """As the engine does, before anything is written."""
    if deterministic and params.temperature > 0 and params.seed is None:
        raise InputError(f"{where} has temperature {params.temperature} and no seed: --deterministic takes --seed")


def _ask_params(filters: "kogpt_jax.SamplingParams", prompt_len: int) -> "kogpt_jax.SamplingParams":
    """The filters with the temperature and length that the answers give."""
    params = _ask_value("temperature", _PROMPT_TEMPERATURE, lambda answer: _with_temperature(filters, answer))
    return _ask_value("max_length", _PROMPT_MAX_LENGTH, lambda answer: _with_max_length(params, answer, prompt_len))


def _with_temperature(params: "kogpt_jax.SamplingParams", answer: str) -> "kogpt_jax.SamplingParams":
    try:
        temperature = float(answer)
    except ValueError:
        raise InputError(f"temperature must be a number, got {answer!r}") from None
    return dataclasses.replace(params, temperature=temperature)


def _with_max_length(params: "kogpt_jax.SamplingParams", answer: str, prompt_len: int) -> "kogpt_jax.SamplingParams":
    try:
        max_len = int(answer)
    except ValueError:
        raise InputError(f"max_length must be an integer, got {answer!r}") from None
    if max_len <= prompt_len:
        raise InputError(f"max_length must be more than the {prompt_len} tokens of the prompt, got {max_len}")
    return dataclasses.replace(params, max_new_tokens=max_len - prompt_len)


def _ask(question: str) -> str | None:
    """A line from the user or the pipe; None at its end."""
    if _is_terminal(sys.stdin) and _is_terminal(sys.stdout):
        try:
            return input(question)
        except EOFError:
            _emit("\n")
            return None
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not UTF-8: {error.reason}") from error
    # `input` would put the question among the results.
    _tell(question)
    stdin = cast(TextIO | None, sys.stdin)
    line = b"" if stdin is None else stdin.buffer.readline()
    if not (_is_terminal(stdin) and line):
        _tell("\n")  # the Enter that nobody typed
    return decode_utf8("stdin", line).rstrip("\r\n") if line else None


def _ask_value(name: str, default: str, parse: Callable[[str], _T]) -> _T:
    """Asks until ``parse`` takes the answer; a pipe is asked once.

    Raises:
        EOFError: the user has left.
        InputError: ``parse`` refuses what the pipe says or, where it has ended, the default.
    """
    while True:
        answer = _ask(f"{name}({default})> ")
        if answer is None:
            if _is_terminal(sys.stdin):
                raise EOFError
            return parse(default)
        try:
            return parse(answer.strip() or default)
        except InputError as error:
            if not _is_terminal(sys.stdin):
                raise
            _complain(error)


# -- kogpt score ------------------------------------------------------------------------------------------------------


@app.command()
def score(
    model: _Model = "demo",
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", "-t", metavar="TEXT", help="Text to score; may be repeated. Without it: --file or stdin."
        ),
    ] = None,
    file: Annotated[pathlib.Path | None, typer.Option("--file", "-f", help="Texts to score, one a line.")] = None,
    dtype: _DtypeOption = None,
    quant: _Quant = "none",
    calibration: _Calibration = None,
    keep_quantized: _KeepQuantized = True,
    kv_dtype: _KvDtype = None,
    mesh: _Mesh = "d1p1t1",
    coordinator: _Coordinator = None,
    num_processes: _NumProcesses = None,
    process_id: _ProcessId = None,
    max_batch_size: _MaxBatchSize = 64,
    nan_guard: _NanGuard = False,
    deterministic: _Deterministic = False,
    output_format: Annotated[
        Literal["text", "jsonl"],
        typer.Option(
            "--format", help="Of stdout: a table, or a JSON object a line with token log-probabilities in nats."
        ),
    ] = "text",
) -> None:
    """Print the perplexity of texts, and of all together.

    The first token of a text has none before it and counts for nothing.
    """
    rows = _rows_of_all(lambda: _text_rows(text, file), coordinator, num_processes, process_id)
    engine = _load(
        model,
        dtype,
        quant,
        calibration,
        keep_quantized,
        kv_dtype,
        mesh,
        max_batch_size,
        nan_guard=nan_guard,
        deterministic=deterministic,
    )
    token_ids = [_encode(engine, row, at_least=2) for row in rows]
    is_json = output_format == "jsonl"
    from kogpt_jax.engine import perplexity  # here, so that --help need not import JAX

    logprob_sum, num_scored = 0.0, 0
    for first in range(0, len(rows), engine.max_batch_size):
        batch = slice(first, first + engine.max_batch_size)
        try:
            scores = engine.score_ids(token_ids[batch])
        except (InputError, FloatingPointError) as error:
            raise type(error)(_counted_from(error, rows, first)) from error
        if first == 0 and not is_json:  # not before: a model that cannot be run prints nothing
            _emit(f"{'perplexity':>12}  {'tokens':>7}  text\n")
        for index, (row, result) in enumerate(zip(rows[batch], scores, strict=True), first):
            logprob_sum += sum(logprob for logprob in result.logprobs if logprob is not None)
            num_scored += len(result.token_ids) - 1
            if is_json:
                record = {"index": index, "text": row.text, "perplexity": _finite_or_none(result.perplexity)}
                _emit_json(record | {"token_ids": result.token_ids, "logprobs": result.logprobs})
            else:
                _emit(f"{result.perplexity:>12.3f}  {len(result.token_ids):>7}  {_shortened(row.text)}\n")
    total = perplexity(-logprob_sum / num_scored)
    num_tokens = sum(map(len, token_ids))
    if is_json:
        _emit_json({"total": {"texts": len(rows), "tokens": num_tokens, "perplexity": _finite_or_none(total)}})
    else:
        _emit(f"{total:>12.3f}  {num_tokens:>7}  total of {len(rows)}\n")


def _finite_or_none(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 1] + "…"


# -- kogpt autotune ---------------------------------------------------------------------------------------------------


@app.command()
def autotune(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="DIR", help="Model whose sizes count, its weights unread; 'demo' if none is given."
        ),
    ] = None,
    shape: Annotated[
        Literal["kogpt-6b", "demo"] | None, typer.Option(help="In place of --model: the sizes of a known model.")
    ] = None,
    dtype: _DtypeOption = None,
    quant: Annotated[
        Literal["w8a16", "w8a8"] | None, typer.Option(help="Quantisation to measure; each if not given.")
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens that are read at once, prompts of a batch together; may be repeated. Each stands for what is "
            "up to its next power of two. 16 to 8192 if not given."
        ),
    ] = None,
    mesh: _Mesh = "d1p1t1",
) -> None:
    """Measure this machine: which way to run a layer's INT8 products is the fastest.

    Times each way with random data, leaves out those whose results are wrong, and keeps the times in a file of the
    cache folder, where every later start with --implementation auto finds them. Takes minutes; nothing else should run
    on the device. Ctrl-C keeps what was measured.
    """
    import jax  # here, so that --help need not wait for it

    from kogpt_jax import runtime, tuning
    from kogpt_jax.ops import describe, resolve_ops
    from kogpt_jax.sharding import parse_mesh

    _, num_stages, num_shards = parse_mesh(mesh)
    runtime.configure()
    configs = tuning.load_configs(model, shape, dtype, ["w8a16", "w8a8"] if quant is None else [quant])
    platform = jax.default_backend()
    problems = tuning.make_problems(configs, rows or tuning.DEFAULT_ROWS, platform=platform, num_shards=num_shards)
    results, path = tuning.tune_products(problems, platform=platform, progress=True)
    for line in tuning.table_lines(results):
        _emit(line + "\n")
    for result in results:
        for choice, reason in result.rejected:
            _tell(f"kogpt: {result.key.op} at {result.key.rows} rows: {choice} is left out: {reason}\n")
    for config in configs:
        ops = resolve_ops(config, "auto", platform=platform, num_shards=num_shards, num_stages=num_stages)
        _emit(f"auto with {config.quant} in {config.dtype}: {describe(ops)}\n")
    _emit(f"kept in {path}\n")


# -- kogpt quantize ---------------------------------------------------------------------------------------------------


@app.command("quantize")
def quantize_model(
    model: _Model = "demo",
    quant: Annotated[
        Literal["w8a16", "w8a8"], typer.Option(help="What to make; without --calibration both have the same weights.")
    ] = "w8a8",
    calibration: _Calibration = None,
    dtype: _DtypeOption = None,
) -> None:
    """Quantise a model into the cache folder of this machine, where the other commands find it.

    They are given the same --model, --quant, --calibration and --dtype. The other commands do it too where they find
    nothing; here it is done ahead, and what was found for each layer is printed: the strength of smoothing, and the
    relative squared error of the product in INT8 with it and without.
    """
    engine = _load(model, dtype, quant, calibration, True, None, "d1p1t1", 1, needs_tokenizer=False)
    from kogpt_jax import demo, quantized_cache, smoothing  # here, so that --help need not import JAX

    source = demo.DIRECTORY if model == "demo" else pathlib.Path(model)
    text = None if calibration is None else smoothing.read_calibration(calibration, engine.tokenizer)
    entry = quantized_cache.find_entry(source, engine.config, text)
    if entry is None:
        raise InputError(f"quantised weights of {model} could not be kept in {quantized_cache.directory()}")
    if calibration is not None:
        _emit(f"{'layer':>5}  {'product':<7}  {'strength':>8}  {'error':>9}  {'without':>9}\n")
        for layer, products in enumerate(quantized_cache.smoothing_of(entry)):
            for name, found in products.items():
                errors = f"{found['error']:>9.2e}  {found['error_without']:>9.2e}"
                _emit(f"{layer:>5}  {name:<7}  {found['strength']:>8.1f}  {errors}\n")
    _emit(f"{entry}\n")
    _tell("For this machine only: what is made of weights has their licence (KoGPT's: CC BY-NC-ND 4.0).\n")


# -- kogpt eval -------------------------------------------------------------------------------------------------------

eval_app = typer.Typer(
    help="Measure a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(eval_app, name="eval")


@eval_app.command("perplexity")
def eval_perplexity(
    text: Annotated[pathlib.Path, typer.Option("--text", "-t", metavar="FILE", help="Text in UTF-8 to measure on.")],
    model: _Model = "demo",
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line is a document, between end-of-text tokens; else the file is one.")
    ] = False,
    modes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Separated by commas, of fp32, bf16, fp16, w8a16, w8a8, w8a8-smoothed, and each with -kv8, an INT8 "
            "cache. All that is supported if not given; smoothed ones with --calibration.",
        ),
    ] = None,
    calibration: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Text, one document a line, for smoothed modes.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window, 2 or more; the model's context if not given.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window, 1 or more, fewer than it has; half if not given.")
    ] = None,
    dtype: Annotated[_Dtype, typer.Option(help="Dtype of quantised modes for all that is not in INT8.")] = "bf16",
    outliers: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="Make one channel in 32 of the products' inputs this many times larger, above 1; the model's function "
            "stays the same.",
        ),
    ] = None,
    max_documents: Annotated[int | None, typer.Option(help="Measure on the first documents alone, 1 or more.")] = None,
    max_batch_size: Annotated[int, typer.Option(help="Windows that run together at most, 1 or more.")] = 64,
    json_file: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the result; finished modes of a file with the same settings are kept."
        ),
    ] = None,
    plot: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Draw the result (.png, .svg); needs matplotlib.")
    ] = None,
) -> None:
    """Perplexity of a text in each precision, against fp32, with a sliding window.

    "prefill" reads whole windows, as prompts are read and texts scored; "decode" token by token through the cache, as
    text is written. Logit error is the RMS of the difference to fp32's logits, relative to theirs; agreement the share
    of positions with the same likeliest token.
    """
    from kogpt_jax import evaluation  # here, so that --help need not import JAX

    task = evaluation.PerplexityTask(
        model=model,
        text=text,
        per_line=lines,
        window=window,
        stride=stride,
        dtype=dtype,
        calibration=calibration,
        outliers=outliers,
        max_documents=max_documents,
        max_batch_size=max_batch_size,
    )
    if plot is not None:
        evaluation.check_plot(plot)
    names = evaluation.default_modes(calibration is not None) if modes is None else modes.split(",")
    result = evaluation.measure_perplexity(
        task, names, json_file, progress=True, tell=lambda line: _tell(f"kogpt: {line}\n")
    )
    _emit(evaluation.heading(result) + "\n")
    columns = f"{'perplexity':>10}{'change %':>11}{'logit error':>13}{'agreement':>11}{'tokens/s':>11}"
    _emit(f"{'mode':<18}{'phase':<9}{columns}\n")
    for name, phase, row in evaluation.table_rows(result):
        speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
        _emit(
            f"{name:<18}{phase:<9}{row['perplexity']:>10.3f}{row['perplexity_percent_more']:>+11.3f}"
            f"{row['logit_error']:>13.2e}{row['agreement']:>11.4f}{speed:>11}\n"
        )
    if plot is not None:
        evaluation.write_plot(result, plot)


# -- kogpt info -------------------------------------------------------------------------------------------------------


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="DIR", help="Tell of this model too, its weights unread."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, devices, settings and, with --model, what a model is and needs."""
    from kogpt_jax import info as info_module

    report = info_module.make_report(model)
    if as_json:
        _emit_json(report)
    else:
        _emit("\n".join(info_module.report_lines(report)) + "\n")


# -- Models and texts -------------------------------------------------------------------------------------------------


def _load(
    model: str,
    dtype: _Dtype | None,
    quant: _QuantMode,
    calibration: pathlib.Path | None,
    keep_quantized: bool,
    kv_dtype: _KvDtypeName | None,
    mesh: str,
    max_batch_size: int,
    implementation: _Choice = "auto",
    nan_guard: bool = False,
    deterministic: bool = False,
    needs_tokenizer: bool = True,
) -> "kogpt_jax.KoGPT":
    if max_batch_size < 1:  # here too, to name the option
        raise InputError(f"--max-batch-size must be at least 1, got {max_batch_size}")
    engine = kogpt_jax.KoGPT.from_pretrained(
        model,
        dtype=dtype,
        quant=quant,
        calibration=calibration,
        keep_quantized=keep_quantized,
        kv_dtype=None if kv_dtype == "none" else kv_dtype,
        mesh=mesh,
        max_batch_size=max_batch_size,
        implementation=implementation,
        nan_guard=nan_guard,
        deterministic=deterministic,
        progress=not _process_id,
    )
    if engine.tokenizer is None and needs_tokenizer:
        raise InputError(f"{model} has no tokenizer: expected tokenizer.json or a SentencePiece *.model in it")
    return engine


def _encode(engine: "kogpt_jax.KoGPT", row: TextRow, *, at_least: int = 1) -> list[int]:
    """Token ids of a text that fits the context; errors say where the text came from."""
    assert engine.tokenizer is not None
    try:
        token_ids = engine.tokenizer.encode(row.text)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error
    if len(token_ids) < at_least:
        raise InputError(f"{row.where} must have at least {at_least} tokens, got {len(token_ids)}")
    if len(token_ids) > engine.config.max_len:
        raise InputError(f"{row.where} has {len(token_ids)} tokens, more than the context of {engine.config.max_len}")
    return token_ids


def _rows_of_all(
    read: Callable[[], list[TextRow]], coordinator: str | None, num_processes: int | None, process_id: int | None
) -> list[TextRow]:
    """What ``read`` finds. One of several processes joins the others first, and has what process 0 finds; from then on
    only process 0 prints results."""
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise InputError("--num-processes and --process-id take --coordinator")
        return read()
    from kogpt_jax import distributed  # here, so that --help need not import JAX

    global _process_id
    _process_id = distributed.initialize(coordinator, num_processes, process_id)
    _print_in_process_0_alone()
    rows = distributed.made_by_process_0(lambda: [dataclasses.asdict(row) for row in read()])
    return [TextRow(**row) for row in rows]


def _prompt_rows(prompts: Sequence[str] | None, input_format: str) -> list[TextRow]:
    """The prompts of the command line, else those of stdin."""
    if prompts:
        if input_format != "text":
            raise InputError(f"--input-format {input_format} is for stdin and takes no --prompt")
        return argument_rows("--prompt", prompts)
    rows = stdin_rows("--prompt")
    return rows if input_format == "text" else [json_row(row) for row in rows]


def _text_rows(texts: Sequence[str] | None, file: pathlib.Path | None) -> list[TextRow]:
    """The texts of the command line, else those of a file or stdin."""
    if texts and file is not None:
        raise InputError(f"--text and --file {file} exclude each other")
    if texts:
        return argument_rows("--text", texts)
    if file is None:
        return stdin_rows("--text or --file")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InputError(f"--file {file} cannot be read: {error.strerror}") from error
    return line_rows(str(file), raw)


def _with_options(params: "kogpt_jax.SamplingParams", row: TextRow) -> "kogpt_jax.SamplingParams":
    try:
        return dataclasses.replace(params, **row.options)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error


# -- Output -----------------------------------------------------------------------------------------------------------


def _print_in_process_0_alone() -> None:
    """Results of other processes go nowhere; and what Gloo writes to C's stdout goes to stderr."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if _process_id == 0 and sys.stdout is None:  # the shell closed it
        return
    results = os.dup(1) if _process_id == 0 else nowhere
    os.dup2(nowhere if sys.stderr is None else 2, 1)
    sys.stdout = os.fdopen(results, "w", encoding="utf-8")


def _emit(text: str) -> None:
    """Writes to stdout at once, so that a pipe has each result as soon as it is there.

    Raises:
        SystemExit: nobody reads any more (141, in silence, as a program that SIGPIPE ends), or the write failed (1).
    """
    stdout = cast(TextIO | None, sys.stdout)  # None where the shell closed it
    if stdout is None:
        _complain("stdout is closed")
        raise SystemExit(1)
    try:
        stdout.write(text)
        stdout.flush()
    except OSError as error:
        # What is still buffered goes nowhere: the interpreter would try it again, and complain, when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(141) from None
        _complain(f"stdout cannot be written: {error.strerror}")
        raise SystemExit(1) from None


def _is_terminal(stream: TextIO | None) -> bool:
    """None, where the shell closed the stream, is no terminal."""
    return stream is not None and stream.isatty()


def _emit_json(record: dict[str, Any]) -> None:
    _emit(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _complain(message: object) -> None:
    """One line on stderr, also where a name in it holds a line feed."""
    line = str(message).replace("\r", "\\r").replace("\n", "\\n")
    who = "" if _process_id is None else f"process {_process_id}: "
    _tell(f"kogpt: error: {who}{line}\n")


def _tell(text: str) -> None:
    """Writes to stderr; nowhere if the shell closed it (``print`` would then write among the results)."""
    stderr = cast(TextIO | None, sys.stderr)
    if stderr is not None:
        stderr.write(text)
        stderr.flush()
