"""What a precision costs: perplexity of a text in every mode, against the same model in fp32.

Perplexity is exp of the mean negative log-probability of the tokens after the first of a document, each predicted from
those before it within a window that slides over the document by ``stride`` tokens: a token counts in the first window
that holds it, so but for a document's start it has at least ``window - stride`` tokens before it ("Perplexity of
fixed-length models", documentation of Hugging Face transformers).

A mode reads the text in two ways. "prefill": whole windows at once, as prompts are read and texts scored. "decode":
token by token through the cache, as text is written. Both are compared with what fp32 makes of whole windows:

- logit error: the root mean square of the difference of logits, relative to that of the fp32 logits;
- agreement: the share of positions at which both find the same token likeliest, given the text so far.

Each mode that has finished is kept in the result file at once, and a run with the same settings takes it from there.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from custom_ops import library_info
from kogpt_jax import checkpoint, decoding, demo, kv_cache, runtime, smoothing
from kogpt_jax.config import Dtype, ModelConfig, Quant
from kogpt_jax.engine import KoGPT, perplexity
from kogpt_jax.environment import check_writable, environment, write_result
from kogpt_jax.errors import InputError
from kogpt_jax.json_files import read_json_object
from kogpt_jax.model import model_def
from kogpt_jax.packing import pack_whole
from kogpt_jax.progress import progress_bar
from kogpt_jax.sharding import make_mesh
from kogpt_jax.text_files import line_documents, read_text_file
from kogpt_jax.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from kogpt_jax.weight_files import find_weight_files

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)

# Logits of a batch in f32 take at most this, unless one window alone takes more. Some four times it is needed.
_LOGITS_BYTES = 1 << 28
_WIDTH = 32  # lengths are rounded up to multiples of this, so that few programs are compiled

# One channel in this many is made an outlier, of each of: LayerNorm's output, attention's, GELU's.
_OUTLIER_SHARE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """A precision to measure."""

    dtype: Dtype | None = None  # None: what the run says
    quant: Quant = "none"
    is_smoothed: bool = False
    kv_dtype: str | None = None  # None: the dtype


_WEIGHT_MODES = {
    "fp32": Mode(dtype="fp32"),
    "bf16": Mode(dtype="bf16"),
    "fp16": Mode(dtype="fp16"),
    "w8a16": Mode(quant="w8a16"),
    "w8a8": Mode(quant="w8a8"),
    "w8a8-smoothed": Mode(quant="w8a8", is_smoothed=True),
}
INT8_CACHE = {f"{name}-kv8": dataclasses.replace(mode, kv_dtype="int8") for name, mode in _WEIGHT_MODES.items()}
MODES: dict[str, Mode] = _WEIGHT_MODES | INT8_CACHE


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityTask:
    """What to measure. What may change the figures is in here, the modes apart.

    Raises:
        InputError: a number is out of its range.
    """

    model: str
    text: pathlib.Path
    per_line: bool = False  # each line is a document of its own, between end-of-text tokens; else the file is one
    window: int | None = None  # tokens; None: the model's context
    stride: int | None = None  # tokens; None: half a window
    dtype: Dtype = "bf16"  # of activations and of what is not quantised, in quantised modes
    calibration: pathlib.Path | None = None  # the text for modes that are smoothed
    outliers: float | None = None  # see `add_outliers`
    max_documents: int | None = None  # only the first ones
    max_batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("window", "stride", "max_documents", "max_batch_size"):
            value = getattr(self, name)
            least = 2 if name == "window" else 1
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if self.outliers is not None and not (math.isfinite(self.outliers) and self.outliers > 1):
            raise InputError(f"outliers must be a factor above 1, got {self.outliers}")


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens that are read together, and which of them count."""

    token_ids: Sequence[int]
    first_target: int  # index of the first token that counts, at least 1: it is predicted from those before it


def sliding_windows(token_ids: Sequence[int], window: int, stride: int) -> list[Window]:
    """The windows of a document: every token but the first counts in one of them.

    # 6 tokens, window 4, stride 2  ->  t0 t1 t2 t3, of which t1 t2 t3 count; t2 t3 t4 t5, of which t4 t5 count
    """
    windows = []
    num_counted = 1  # the first has nothing before it
    for start in range(0, len(token_ids), stride):
        end = min(start + window, len(token_ids))
        if end > num_counted:
            windows.append(Window(token_ids[start:end], num_counted - start))
            num_counted = end
    return windows


def measure_perplexity(
    task: PerplexityTask,
    modes: Sequence[str],
    result_file: pathlib.Path | None = None,
    *,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures each mode and keeps it in ``result_file``, from which modes that are there already are taken.

    Args:
        task: what to measure.
        modes: names of ``MODES``.
        result_file: JSON. One of other settings is written anew.
        progress: show progress bars, if stderr is a terminal.
        tell: takes a line for the user: what is taken from the file, or that it is written anew.

    Returns:
        What the file holds: "settings", "environment", and of each mode of "modes" its phases.

    Raises:
        InputError: an unknown mode, a smoothed one without calibration, a bad file, or what loading the model refuses.
        FloatingPointError: a mode's logits are not finite.
    """
    for name in modes:
        if name not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, got {name!r}")
        if MODES[name].is_smoothed and task.calibration is None:
            raise InputError(f"mode {name} needs a calibration text")
    runtime.configure()
    if result_file is not None:
        check_writable(result_file)
    source = _Source(task)
    windows = source.windows()
    result = {
        "settings": source.settings(windows),
        "environment": environment(),
        "modes": {},
    }
    if result_file is not None and result_file.exists():
        kept = read_json_object(result_file)
        if all(kept.get(part) == result[part] for part in ("settings", "environment")) and "modes" in kept:
            result["modes"] = kept["modes"]
        else:
            tell(f"{result_file} was measured with other settings or versions: it is written anew")
    taken = [name for name in modes if name in result["modes"]]
    if taken:
        tell(f"taken from {result_file}: {', '.join(taken)}")
    missing = [name for name in modes if name not in result["modes"]]
    if missing:
        reference = source.engine(MODES["fp32"], progress=progress)
        for name in missing:
            engine = reference if name == "fp32" else source.engine(MODES[name], progress=progress)
            result["modes"][name] = _measure(name, engine, reference, windows, task.max_batch_size, progress)
            write_result(result_file, result)
    return result


# -- The model in each mode -------------------------------------------------------------------------------------------


class _Source:
    """The model and the text of a task."""

    def __init__(self, task: PerplexityTask):
        self.task = task
        self.directory = demo.DIRECTORY if task.model == "demo" else pathlib.Path(task.model)
        self.text = read_text_file("text", task.text)
        self.config = checkpoint.load_config(self.directory, dtype="fp32")
        tokenizer_file = find_tokenizer(self.directory)
        if tokenizer_file is None:
            raise InputError(f"{task.model} has no tokenizer: expected tokenizer.json or a SentencePiece *.model in it")
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer_file)
        self.window = self.config.max_len if task.window is None else task.window
        self.stride = self.window // 2 if task.stride is None else task.stride
        if self.window > self.config.max_len:
            raise InputError(f"window must be at most the context of {self.config.max_len}, got {self.window}")
        if self.stride >= self.window:
            raise InputError(f"stride must be less than the window of {self.window}, got {self.stride}")
        self.calibration = None
        if task.calibration is not None:
            self.calibration = smoothing.read_calibration(task.calibration, self.tokenizer)

    def windows(self) -> list[Window]:
        task = self.task
        if task.per_line:
            documents = line_documents(self.text.text, self.tokenizer)
        else:
            documents = [self.tokenizer.encode(self.text.text)]
        documents = documents[: task.max_documents]
        windows = [part for document in documents for part in sliding_windows(document, self.window, self.stride)]
        if not windows:
            raise InputError(f"text {task.text} must have at least 2 tokens in a document")
        return windows

    def settings(self, windows: Sequence[Window]) -> dict[str, Any]:
        """What the figures depend on, as JSON has it. Paths are the caller's own: file and folder names alone."""
        task = self.task
        calibration = self.calibration
        return {
            "model": self.directory.resolve().name if task.model != "demo" else "demo",
            "weights": {
                path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in find_weight_files(self.directory)
            },
            "config": dataclasses.asdict(self.config) | {"eos_token_ids": list(self.config.eos_token_ids)},
            "tokenizer_sha256": smoothing.tokenizer_digest(self.tokenizer),
            "libraries": {info.name: info.source_hash for info in library_info() if info.problem is None},
            "text": {"name": task.text.name, **self.text.identity},
            "per_line": task.per_line,
            "max_documents": task.max_documents,
            "window": self.window,
            "stride": self.stride,
            "tokens": sum(len(window.token_ids) - window.first_target for window in windows),
            "dtype": task.dtype,
            "calibration": None if calibration is None else {"name": calibration.text.path.name, **calibration.record},
            "outliers": task.outliers,
            "outlier_share": None if task.outliers is None else 1 / _OUTLIER_SHARE,
            "max_batch_size": task.max_batch_size,
        }

    def engine(self, mode: Mode, *, progress: bool) -> KoGPT:
        dtype = self.task.dtype if mode.dtype is None else mode.dtype
        calibration = self.task.calibration if mode.is_smoothed else None
        if self.task.outliers is None:
            return KoGPT.from_pretrained(
                self.directory,
                dtype=dtype,
                quant=mode.quant,
                calibration=calibration,
                kv_dtype=mode.kv_dtype,
                progress=progress,
            )
        mesh = make_mesh()
        leaves = checkpoint.load_leaves(self.directory, self.config, mesh, progress=progress)
        by_path = {param.path: leaf for param, leaf in zip(model_def(self.config).params, leaves, strict=True)}
        del leaves
        add_outliers(self.config, by_path, self.task.outliers)
        config = dataclasses.replace(self.config, has_multiplier=True)
        if mode.is_smoothed:
            assert self.calibration is not None
            windows = smoothing.text_windows(self.calibration, config.max_len)
            smoothing.smooth(config, by_path, mesh, windows, self.calibration.settings, progress=progress)
        config = dataclasses.replace(config, dtype=dtype, quant=mode.quant, kv_dtype=mode.kv_dtype)
        return KoGPT(config, smoothing.quantized_leaves(config, by_path, mesh), mesh, self.tokenizer)


def add_outliers(config: ModelConfig, by_path: dict[str, Array], factor: float) -> None:
    """Gives an unquantised model channels that are ``factor`` times what they were, as models of billions of parameters
    have them and small ones do not (Dettmers et al. 2022, "LLM.int8()"). Its function stays what it was.

    Of the inputs of ``w_in`` (LayerNorm's scale and bias), and of attention's half of ``w_out``'s (V's rows), and the
    weights' columns take the factor back. GELU is not homogeneous, so that nothing in front of it can give its half of
    them exactly: there the factor is in ``w_out_multiplier``, where the ops apply it before they round to INT8.

    Args:
        config: of the model, without multiplier.
        by_path: its leaves in f32. Replaced by those of the model that ``has_multiplier``.
        factor: above 1.
    """
    rng = np.random.default_rng(0)

    def factors(*extents: int) -> np.ndarray:
        parts = [np.ones(extent, np.float32) for extent in extents]
        for part in parts:
            part[rng.permutation(len(part))[: max(1, len(part) // _OUTLIER_SHARE)]] = 1 / factor
        return np.concatenate(parts)

    for layer in range(config.num_layers):
        w_in, w_out = factors(config.model_dim), factors(config.model_dim, config.ffn_dim)
        by_path |= smoothing.rescale_layer(by_path, layer, config, w_in=w_in, w_out=w_out)


# -- The measurement --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Totals:
    """Sums over the positions of one phase."""

    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(5))  # as `_sums` has them
    num_tokens: int = 0
    timed_tokens: int = 0
    timed_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        nats, reference_nats, agreeing, squares, reference_squares = self.sums
        return {
            "tokens": self.num_tokens,
            "perplexity": perplexity(nats / self.num_tokens),
            "perplexity_percent_more": 100 * math.expm1((nats - reference_nats) / self.num_tokens),
            "logit_error": math.sqrt(squares / reference_squares),
            "agreement": agreeing / self.num_tokens,
            # Of programs that had run before; None where each ran once.
            "tokens_per_s": self.timed_tokens / self.timed_s if self.timed_tokens else None,
        }


def _measure(
    name: str, engine: KoGPT, reference: KoGPT, windows: Sequence[Window], max_batch_size: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """One mode, all its phases."""
    totals = {phase: _Totals() for phase in PHASES}
    seen: set[tuple[int, ...]] = set()
    batches = list(_batches(windows, max_batch_size, reference.config))
    with progress_bar(len(batches), progress) as advance:
        for tokens, is_target in batches:
            expected = _logits(reference, tokens, "prefill")
            num_tokens = int(is_target.sum())
            for phase in PHASES:
                start = time.perf_counter()
                logits = jax.block_until_ready(_logits(engine, tokens, phase))
                if tokens.shape in seen:
                    totals[phase].timed_s += time.perf_counter() - start
                    totals[phase].timed_tokens += num_tokens
                sums = np.asarray(_sums(logits, expected, tokens, is_target), np.float64)
                if not np.isfinite(sums).all():
                    raise FloatingPointError(f"mode {name}: the logits are not finite (dtype {engine.config.dtype})")
                totals[phase].sums += sums
                totals[phase].num_tokens += num_tokens
            seen.add(tokens.shape)
            advance(name, 1)
    return {phase: total.as_json() for phase, total in totals.items()}


def _batches(
    windows: Sequence[Window], max_batch_size: int, config: ModelConfig
) -> Iterator[tuple[Int[np.ndarray, "B T"], np.ndarray]]:
    """Tokens, left-aligned, and which of them count; windows of like lengths together, padded to few shapes."""
    remaining = sorted(windows, key=lambda window: len(window.token_ids), reverse=True)
    while remaining:
        width = min(-(-len(remaining[0].token_ids) // _WIDTH) * _WIDTH, config.max_len)
        fitting = max(1, _LOGITS_BYTES // (width * config.vocab_size * 4))
        batch = 2 ** int(math.log2(min(fitting, max_batch_size)))
        group, remaining = remaining[:batch], remaining[batch:]
        tokens, is_target = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
        for slot, window in enumerate(group):
            tokens[slot, : len(window.token_ids)] = window.token_ids
            is_target[slot, window.first_target : len(window.token_ids)] = True
        yield tokens, is_target


def _logits(engine: KoGPT, tokens: Int[np.ndarray, "B T"], phase: Phase) -> Float[Array, "B T V"]:
    if phase == "prefill":
        chunks = pack_whole(tokens.tolist(), num_shards=1, num_chunks=1)
        return engine._start(decoding.all_logits, engine.leaves, chunks)[0, : tokens.size].reshape(*tokens.shape, -1)
    cache = kv_cache.make_kv_cache(engine.config, engine.mesh, *tokens.shape)
    return engine._start(decoding.stepped_logits, engine.leaves, cache, tokens)


@jax.jit
def _sums(
    logits: Float[Array, "B T V"], expected: Float[Array, "B T V"], tokens: Int[Array, "B T"], is_target: Array
) -> Float[Array, " 5"]:
    """Negative log-probabilities of the tokens that count, by both; how often both like the same token best; squared
    differences of logits, and squared logits."""
    targets, is_predicting = tokens[:, 1:, None], is_target[:, 1:]  # by the position before
    logits, expected = logits[:, :-1], expected[:, :-1]

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(is_predicting, values, 0))

    def nats(logits: Array) -> Array:
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets, axis=-1)[..., 0]

    agrees = jnp.argmax(logits, axis=-1) == jnp.argmax(expected, axis=-1)
    return jnp.stack(
        [
            total(nats(logits)),
            total(nats(expected)),
            total(agrees),
            total(jnp.sum(jnp.square(logits - expected), axis=-1)),
            total(jnp.sum(jnp.square(expected), axis=-1)),
        ]
    )


# -- What is shown ----------------------------------------------------------------------------------------------------


def default_modes(has_calibration: bool) -> list[str]:
    """All that can be measured: smoothed ones with a calibration text."""
    return [name for name, mode in MODES.items() if has_calibration or not mode.is_smoothed]


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(mode, phase, figures) of each line of a table, in the order of ``MODES``."""
    modes = result["modes"]
    return [(name, phase, figures) for name in MODES if name in modes for phase, figures in modes[name].items()]


def heading(result: Mapping[str, Any]) -> str:
    """One line that says what was measured; outliers are named."""
    settings = result["settings"]
    outliers = settings["outliers"]
    added = "" if outliers is None else f", with added outliers (x{outliers:g}, function-preserving)"
    return (
        f"{settings['model']}{added}: {settings['text']['name']}, {settings['tokens']} tokens, "
        f"window {settings['window']}, quantised modes in {settings['dtype']}, {result['environment']['device']}"
    )


def write_plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """A bar chart of what each mode costs in perplexity and in logits.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    rows = [row for row in table_rows(result) if row[0] != "fp32"]
    labels = [f"{name}, {phase}" for name, phase, _ in rows]
    figures = {"perplexity_percent_more": "perplexity over fp32, %", "logit_error": "logit error (RMS, relative)"}
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), figures.items(), strict=True):
        axes.barh(labels[::-1], [values[key] for _, _, values in rows[::-1]])
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(heading(result), fontsize=7)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"plot {path} cannot be written: {error}") from error


def check_plot(path: pathlib.Path) -> None:
    """That a plot can be drawn: asked before hours of measuring.

    Raises:
        InputError: matplotlib is missing, or the name's suffix is none of its formats.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise InputError(f"plot {path} needs matplotlib: pip install kogpt-jax[plot]") from None
    suffixes = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in suffixes:
        raise InputError(f"plot {path} must end in one of {', '.join(sorted(suffixes))}")
