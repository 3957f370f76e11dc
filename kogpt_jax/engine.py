"""`KoGPT`: a loaded model that continues and scores text. The only stateful class, and the state is fixed once loaded.

A call becomes batches of rows; a batch becomes `prefill` of its packed prompts, chunk by chunk, and as many chunks of
`decode_loop` as its longest row needs. Batch sizes, packed tokens and cache capacities are rounded up to buckets, so
that a new length meets a program that is compiled already.
"""

import collections
import dataclasses
import itertools
import math
import operator
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from custom_ops import NO_TOKEN
from custom_ops.prefill_attention import QUERY_BLOCK, SCORE_BYTES
from kogpt_jax import (
    checkpoint,
    decoding,
    demo,
    distributed,
    kv_cache,
    model,
    quantized_cache,
    runtime,
    sharding,
    smoothing,
)
from kogpt_jax.config import DTYPES, QUANTS, Dtype, ModelConfig, OpsConfig, Quant
from kogpt_jax.decoding import DecodeState, Emitted
from kogpt_jax.errors import InputError
from kogpt_jax.kv_cache import KVCache
from kogpt_jax.nan_guard import NanGuard
from kogpt_jax.ops import Choice, check_choice, resolve_ops
from kogpt_jax.packing import (
    CHUNK_TOKENS,
    Packed,
    bucket,
    deal,
    num_whole_chunks,
    pack_prompts,
    pack_whole,
    power_bucket,
)
from kogpt_jax.sampling import RowSampling, SamplingParams
from kogpt_jax.sharding import Split, mesh_name
from kogpt_jax.tokenizer import IncrementalDecoder, Tokenizer, find_tokenizer, load_tokenizer

FinishReason = Literal["stop", "length"]

# Steps between two looks of the host at the tokens. A batch computes at most this many steps, less one, that nobody
# needs.
STEPS_PER_CHUNK = 8

# Of a device's memory that the weights leave: set aside for small caches of batches that are done.
_KEPT_SHARE = 1 / 32

_GPTJ_DEFAULT_EOS = 50256

# Programs that sum over devices by the project's kernel must begin in one order on all of them
# (`custom_ops.all_reduce`), whichever threads and engines start them.
_STARTING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of one prompt."""

    text: str | None  # what follows the prompt, without special tokens; None where there is no tokenizer
    token_ids: tuple[int, ...]  # with the end-of-text token, if one was sampled
    logprobs: tuple[float, ...]  # of each token, under the model before temperature and filters
    finish_reason: FinishReason  # "stop": end-of-text sampled; "length": max_new_tokens or the context reached
    usage: Usage


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """New text of one prompt. ``finish_reason`` is set on the prompt's last event."""

    index: int  # which prompt
    text: str | None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token, as in `Completion`
    finish_reason: FinishReason | None


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely the model finds a text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]  # of each token after those before it; None for the first, which has none before
    perplexity: float  # exp of the mean negative log-probability of all tokens but the first


@dataclasses.dataclass(frozen=True)
class _Request:
    """One prompt under way."""

    index: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # what params ask for, or less where the context ends before


# A row that fills a batch up: it is read, and emits nothing.
_PADDING = _Request(index=-1, prompt_ids=(0,), params=SamplingParams(), max_new_tokens=0)


@dataclasses.dataclass(frozen=True)
class _NewTokens:
    """What a chunk added to one request."""

    request: _Request
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None


class KoGPT:
    """A GPT-J-architecture model with its tokenizer, on a mesh of devices.

    model = KoGPT.from_pretrained("demo")
    print(model.generate("이 영화는")[0].text)
    """

    def __init__(
        self,
        config: ModelConfig,
        leaves: Sequence[jax.Array],
        mesh: Mesh,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch_size: int = 64,
        implementation: Choice = "auto",
        nan_guard: bool = False,
        deterministic: bool = False,
    ):
        """For callers that hold leaves already; others use `from_pretrained`.

        Args:
            config: of the model.
            leaves: parameters in the order of ``model_def(config, Split.of(mesh)).params``.
            mesh: from `sharding.make_mesh`.
            tokenizer: None leaves the token-id level only.
            max_batch_size: rows that run together at most; longer lists of prompts run one batch after the other.
            implementation: what runs the ops: "ffi" (the project's kernels), "reference" (XLA), or "auto", the
                faster of those that this machine has. ``ops`` has what was chosen.
            nan_guard: look at the output of every op, so that the `FloatingPointError` of logits that are not finite
                names the first layer and op whose output was not. For debugging: it takes time, and one process.
            deterministic: give each row the same tokens, log-probabilities and scores, bit for bit, whatever runs
                beside it (docs/deterministic.md). Takes the kernels of decode steps, and time: every batch has
                ``max_batch_size`` rows, each prompt is read alone, and so is each text that is scored.

        Raises:
            InputError: an unsupported argument, or kernels that are not there for this model; the message names it.
        """
        _check_max_batch_size(max_batch_size)
        _check_nan_guard(nan_guard)
        config = resolve_eos(config, tokenizer)
        self.config = config
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.leaves = tuple(leaves)
        platform, split = mesh.devices.flat[0].platform, Split.of(mesh)
        self.deterministic = deterministic
        self.ops = _resolve_ops(config, implementation, mesh, max_batch_size, deterministic)
        # What a machine has built and measured is in `ops`.
        distributed.check_same(
            "model or ops", (config, mesh_name(mesh), max_batch_size, self.ops, nan_guard, deterministic)
        )
        self._guard = NanGuard(split.layers_per_stage(config.num_layers)) if nan_guard else None
        self._definition = model.model_def(config, split, self.ops, self._guard)
        self._static: dict[str, Any] = {"definition": self._definition, "mesh": mesh}  # of every phase
        # On a CPU a chunk that turns out not to be needed would cost more than the wait.
        self._chunks_in_flight = 1 if platform == "cpu" else 2
        self._no_hidden: dict[int, jax.Array] = {}  # by rows of a batch: what `decoding.prefill` takes first
        unused = distributed.smallest(_unused_bytes(mesh.local_devices))
        self._kept_caches = kv_cache.KeptCaches(config, mesh, unused * _KEPT_SHARE if math.isfinite(unused) else 0.0)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: Dtype | None = None,
        quant: Quant = "none",
        calibration: str | os.PathLike[str] | None = None,
        keep_quantized: bool = True,
        kv_dtype: str | None = None,
        mesh: str = "d1p1t1",
        max_batch_size: int = 64,
        implementation: Choice = "auto",
        nan_guard: bool = False,
        deterministic: bool = False,
        progress: bool = False,
    ) -> "KoGPT":
        """Loads a Hugging Face directory, or the shipped model ``"demo"``.

        Args:
            path: a directory with ``config.json``, weights and usually a tokenizer; ``"demo"`` is the shipped model
                (write ``./demo`` for a directory of that name).
            dtype: "fp32", "fp16" or "bf16"; None keeps the dtype of the stored weights.
            quant: "w8a16" holds the weight matrices in INT8 with a scale an output, "none" in ``dtype``. "w8a8" has the
                weights of "w8a16", and where prompts are read and texts scored it rounds the activations of the layers'
                products to INT8 too, with a scale a token; with the kernels for sm_90a in decode steps, too, with a
                scale a row behind LayerNorm and one for 256 columns of a row in front of ``w_out``.
            calibration: a text file for quant "w8a8": its weights are smoothed on it (`smoothing`), a document a line.
                Weights smoothed on another text are other weights, so it must be named at every load; they are made at
                the first and kept, if ``keep_quantized``.
            keep_quantized: keep quantised weights in the cache folder of this machine, and take them from there.
            kv_dtype: "int8" holds the cache of keys and values in INT8 with a scale a token and head; None, or the name
                of the model's dtype, in that.
            mesh: devices along data (rows), pipe (layers) and tensor (heads and FFN units),
                such as "d2p1t4"; after `distributed.initialize` those of all processes.
            max_batch_size: rows that run together at most.
            implementation: "auto", "ffi" or "reference", as for `KoGPT`.
            nan_guard: name the first op whose output is not finite, as for `KoGPT`.
            deterministic: the same bits for a row in any batch, as for `KoGPT`.
            progress: show a progress bar while loading, if stderr is a terminal.

        Raises:
            InputError: an unsupported argument, a mesh that does not divide the model or needs more devices than there
                are, or anything wrong with the files; the message names it.
        """
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if quant not in QUANTS:
            raise InputError(f"quant must be one of {', '.join(QUANTS)}, got {quant!r}")
        if calibration is not None and quant != "w8a8":
            raise InputError(f"calibration {os.fspath(calibration)} is for quant w8a8, got quant {quant}")
        check_choice(implementation)
        extents = sharding.parse_mesh(mesh)
        _check_max_batch_size(max_batch_size)  # before the weights are loaded
        runtime.configure(num_shards=extents[1] * extents[2])
        directory = demo.DIRECTORY if path == "demo" else pathlib.Path(path)
        config = dataclasses.replace(checkpoint.load_config(directory, dtype=dtype), quant=quant, kv_dtype=kv_dtype)
        tokenizer_file = find_tokenizer(directory)
        tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                f"{tokenizer_file} has {tokenizer.vocab_size} tokens, "
                f"more than vocab_size {config.vocab_size} of the model"
            )
        device_mesh = sharding.make_mesh(*extents)
        # Before the weights are loaded: whether the mesh divides the model, and whether the implementation can work.
        model.model_def(config, Split.of(device_mesh))
        _resolve_ops(config, implementation, device_mesh, max_batch_size, deterministic)
        _check_nan_guard(nan_guard)
        settings = (max_batch_size, implementation, nan_guard, deterministic)
        distributed.check_same("model or mesh", (config, mesh, calibration is None, keep_quantized, settings))
        if calibration is not None:
            config = dataclasses.replace(config, has_multiplier=True)
            text = smoothing.read_calibration(calibration, tokenizer)
            if keep_quantized:
                leaves = quantized_cache.load_leaves(
                    directory, config, device_mesh, calibration=text, progress=progress
                )
            elif device_mesh.size == 1:
                leaves, _ = smoothing.make_leaves(directory, config, text, progress=progress)
            else:
                raise InputError(
                    f"calibration on mesh {mesh!r} takes keep_quantized: weights are smoothed on one device"
                )
        elif quant != "none" and keep_quantized:
            leaves = quantized_cache.load_leaves(directory, config, device_mesh, progress=progress)
        else:
            leaves = checkpoint.load_leaves(directory, config, device_mesh, progress=progress)
        return cls(
            config,
            leaves,
            device_mesh,
            tokenizer,
            max_batch_size=max_batch_size,
            implementation=implementation,
            nan_guard=nan_guard,
            deterministic=deterministic,
        )

    @classmethod
    def from_random(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        mesh: str = "d1p1t1",
        max_batch_size: int = 64,
        implementation: Choice = "auto",
        nan_guard: bool = False,
        deterministic: bool = False,
    ) -> "KoGPT":
        """A model of random weights made on the devices, without a tokenizer: for benchmarks and tests."""
        extents = sharding.parse_mesh(mesh)
        _check_max_batch_size(max_batch_size)  # before the weights are made
        runtime.configure(num_shards=extents[1] * extents[2])
        device_mesh = sharding.make_mesh(*extents)
        leaves = model.random_leaves(config, device_mesh, seed=seed)
        return cls(
            config,
            leaves,
            device_mesh,
            max_batch_size=max_batch_size,
            implementation=implementation,
            nan_guard=nan_guard,
            deterministic=deterministic,
        )

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Writes a Hugging Face directory that transformers and `from_pretrained` read, tokenizer included.

        Raises:
            InputError: the model is quantised, or one of several processes, or the directory exists and is not empty,
                or cannot be written.
        """
        if jax.process_count() > 1:
            raise InputError(f"save_pretrained to {os.fspath(directory)} needs a model in one process, not several")
        checkpoint.save_pretrained(
            directory,
            self.config,
            self.leaves,
            split=Split.of(self.mesh),
            max_shard_bytes=max_shard_bytes,
            tokenizer_files=() if self.tokenizer is None else self.tokenizer.files,
        )

    def generate(
        self, prompts: str | Sequence[str], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continues each prompt.

        Args:
            prompts: one text or several.
            params: for all prompts or one for each; None is greedy, 64 tokens.

        Returns:
            A completion for each prompt, in order.

        Raises:
            InputError: no prompt, an empty one, one longer than the context, or no tokenizer.
        """
        return self.generate_ids(self._encode_prompts(prompts), params)

    def generate_ids(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """`generate` from token ids; the completions have text where there is a tokenizer."""
        requests = self._requests(prompt_ids, params)
        token_ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        reasons: dict[int, FinishReason] = {}
        for new in self._run(requests):
            token_ids[new.request.index] += new.token_ids
            logprobs[new.request.index] += new.logprobs
            if new.finish_reason is not None:
                reasons[new.request.index] = new.finish_reason
        return [
            Completion(
                text=self._text(request, token_ids[index], reasons[index]),
                token_ids=tuple(token_ids[index]),
                logprobs=tuple(logprobs[index]),
                finish_reason=reasons[index],
                usage=Usage(len(request.prompt_ids), len(token_ids[index])),
            )
            for index, request in enumerate(requests)
        ]

    def stream(
        self, prompts: str | Sequence[str], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[StreamEvent]:
        """`generate`, event by event. The texts of a prompt's events, joined, are its completion's text."""
        return self.stream_ids(self._encode_prompts(prompts), params)

    def stream_ids(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """`stream` from token ids."""
        # Here and not in the generator: errors come with the call.
        return self._stream(self._run(self._requests(prompt_ids, params)))

    def logits(self, token_ids: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """Logits in f32 of every position of one sequence."""
        ids = self._checked_ids(0, token_ids)
        distributed.check_same("token ids", ids)
        chunks = self._pack_whole(deal([ids], self.mesh.shape["data"]), 1)
        self._kept_caches.clear()
        logits = distributed.fetch(self._start(decoding.all_logits, self.leaves, chunks))
        return logits[0, : len(token_ids)].copy()  # cut here: on the device each length would be a program

    def score(self, texts: str | Sequence[str]) -> list[Score]:
        """Log-probabilities and perplexity of texts.

        Raises:
            InputError: no text, one of fewer than two tokens or longer than the context, or no tokenizer.
        """
        return self.score_ids(self._encode_prompts(texts))

    def score_ids(self, token_ids: Sequence[Sequence[int]]) -> list[Score]:
        """`score` of token ids."""
        if not len(token_ids):
            raise InputError("prompts is empty: nothing to score")
        rows = [self._checked_ids(index, ids) for index, ids in enumerate(token_ids)]
        for index, ids in enumerate(rows):
            if len(ids) < 2:
                raise InputError(f"prompt {index} has 1 token, scoring needs at least 2")
        distributed.check_same("texts", rows)
        scores: list[Score | None] = [None] * len(rows)
        for group in self._scored_together([len(ids) for ids in rows]):
            self._forget_found()
            num_chunks = num_whole_chunks(len(group), self.mesh.shape["pipe"])
            num_parts = num_chunks * self.mesh.shape["data"]
            slots = deal(group, num_parts)
            chunks = self._pack_whole([None if text is None else rows[text] for text in slots], num_chunks)
            logprobs = distributed.fetch(self._start(decoding.score, self.leaves, chunks)).reshape(num_parts, -1)
            begins = np.asarray(chunks.begins).reshape(num_parts, -1)
            for slot, text in enumerate(slots):
                if text is None:
                    continue
                part, place = divmod(slot, begins.shape[1])
                begin = begins[part, place]
                row = logprobs[part, begin : begin + len(rows[text]) - 1].astype(np.float64)
                self._check_finite(text, 1, row)
                scores[text] = Score(rows[text], (None, *row.tolist()), perplexity(-row.mean()))
        return [score for score in scores if score is not None]

    def _encode_prompts(self, prompts: str | Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise InputError("the model directory has no tokenizer: use generate_ids, stream_ids or score_ids")
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise InputError(f"prompts must be a text or a sequence of texts, got {prompts!r}")
        return [self.tokenizer.encode(prompt) for prompt in prompts]

    def _checked_ids(self, index: int, token_ids: Sequence[int]) -> tuple[int, ...]:
        try:
            ids = tuple(map(operator.index, token_ids))
        except TypeError as error:
            raise InputError(f"prompt {index} must be a sequence of token ids: {error}") from None
        if not ids:
            raise InputError(f"prompt {index} is empty")
        if len(ids) > self.config.max_len:
            raise InputError(f"prompt {index} has {len(ids)} tokens, more than the context of {self.config.max_len}")
        for token_id in ids:
            if not 0 <= token_id < self.config.vocab_size:
                raise InputError(f"prompt {index} holds token {token_id}, outside vocab_size {self.config.vocab_size}")
        return ids

    def _requests(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Request]:
        if not len(prompt_ids):
            raise InputError("prompts is empty: nothing to generate")
        if params is None:
            params = SamplingParams()
        rows = [params] * len(prompt_ids) if isinstance(params, SamplingParams) else list(params)
        for row in rows:
            if not isinstance(row, SamplingParams):
                raise InputError(f"params must be SamplingParams, got {row!r}")
        if len(rows) != len(prompt_ids):
            raise InputError(
                f"params must be one or one for each prompt, got {len(rows)} for {len(prompt_ids)} prompts"
            )
        requests = []
        for index, (token_ids, row) in enumerate(zip(prompt_ids, rows, strict=True)):
            ids = self._checked_ids(index, token_ids)
            if self.deterministic and row.temperature > 0 and row.seed is None:
                raise InputError(
                    f"prompt {index} has temperature {row.temperature} and no seed: deterministic takes one"
                )
            # The last token sampled is never read, so one more than the free places of the context.
            max_new_tokens = min(row.max_new_tokens, self.config.max_len - len(ids) + 1)
            requests.append(_Request(index, ids, row, max_new_tokens))
        distributed.check_same("prompts or params", requests)
        return requests

    def _stream(self, run: Iterator[_NewTokens]) -> Iterator[StreamEvent]:
        decoders: dict[int, IncrementalDecoder] = {}
        for new in run:
            text = None
            if self.tokenizer is not None:
                index = new.request.index
                if index not in decoders:
                    decoders[index] = IncrementalDecoder(self.tokenizer, self._readable(new.request.prompt_ids))
                text = decoders[index].push(self._readable(new.token_ids, new.finish_reason))
                if new.finish_reason is not None:
                    text += decoders.pop(index).flush()
            yield StreamEvent(new.request.index, text, new.token_ids, new.logprobs, new.finish_reason)

    def _text(self, request: _Request, token_ids: Sequence[int], reason: FinishReason) -> str | None:
        if self.tokenizer is None:
            return None
        new_ids = self._readable(token_ids, reason)
        return self.tokenizer.decode_continuation(self._readable(request.prompt_ids), new_ids)

    def _readable(self, token_ids: Sequence[int], reason: FinishReason | None = None) -> Sequence[int]:
        """The ids that stand for text: without the end-of-text token, which a tokenizer may hold for a word, and
        without ids that the tokenizer has no token for."""
        assert self.tokenizer is not None
        token_ids = token_ids[:-1] if reason == "stop" else token_ids
        return [token_id for token_id in token_ids if token_id in self.tokenizer]

    def _run(self, requests: Sequence[_Request]) -> Iterator[_NewTokens]:
        """Runs all requests, batch after batch. The batches are made here, so that a prompt too large is refused at
        once."""
        groups = list(self._batches(requests))
        return itertools.chain.from_iterable(map(self._run_batch, groups))

    def _run_batch(self, requests: Sequence[_Request]) -> Iterator[_NewTokens]:
        slots = self._slots(requests)
        num_emitted = [0] * len(slots)
        finished: set[int] = set()
        self._forget_found()
        for emitted in self._dispatch(slots):
            tokens, logprobs = np.asarray(emitted.tokens), np.asarray(emitted.logprobs)
            for slot, request in enumerate(slots):
                count = int(np.sum(tokens[slot] != NO_TOKEN))
                if request is None or slot in finished or count == 0:
                    continue
                token_ids = tuple(tokens[slot, :count].tolist())
                self._check_finite(request.index, len(request.prompt_ids) + num_emitted[slot], logprobs[slot, :count])
                num_emitted[slot] += count
                reason = self._finish_reason(request, token_ids[-1], num_emitted[slot])
                if reason is not None:
                    finished.add(slot)
                yield _NewTokens(request, token_ids, tuple(logprobs[slot, :count].tolist()), reason)

    def _slots(self, requests: Sequence[_Request]) -> list[_Request | None]:
        """The rows of a batch, with None as padding."""
        rows: list[_Request | None] = [*requests]
        if self.deterministic:
            rows += [None] * (self.max_batch_size - len(rows))
        return deal(rows, self.mesh.shape["data"], multiple=self.mesh.shape["pipe"])

    def _forget_found(self) -> None:
        if self._guard is not None:
            self._guard.clear()

    def _check_finite(self, index: int, num_before: int, logprobs: Float[np.ndarray, " T"]) -> None:
        is_finite = np.isfinite(logprobs)
        if is_finite.all():
            return
        if self._guard is None:
            first = "nan_guard=True or --nan-guard tells which op is the first"
        else:
            first = f"first in its batch: {self._guard.first() or 'no op, only the log-probabilities'}"
        raise FloatingPointError(
            f"prompt {index}: the logits are not finite after {num_before + int(np.argmin(is_finite))} tokens "
            f"(dtype {self.config.dtype}; fp16 can overflow where bf16 and fp32 do not); {first}"
        )

    def _finish_reason(self, request: _Request, last_token: int, num_emitted: int) -> FinishReason | None:
        if last_token in self.config.eos_token_ids and not request.params.ignore_eos:
            return "stop"
        return "length" if num_emitted == request.max_new_tokens else None

    def _dispatch(self, slots: Sequence[_Request | None]) -> Iterator[Emitted]:
        """Prefill and chunks of a batch, on the host. On a GPU the next chunk is under way before the host looks at the
        last one."""
        state: DecodeState | None
        most = max(request.max_new_tokens for request in slots if request is not None)
        try:
            state, emitted = self._prefill(slots)
            num_dispatched = 1
            under_way = collections.deque([_fetched(emitted)])
            while True:
                while num_dispatched < most and len(under_way) < self._chunks_in_flight:
                    state, emitted = self._start(decoding.decode_loop, self.leaves, state, num_steps=STEPS_PER_CHUNK)
                    under_way.append(_fetched(emitted))
                    num_dispatched += STEPS_PER_CHUNK
                if state is not None and num_dispatched >= most:  # here, where the host would wait for the devices
                    self._kept_caches.keep(state.cache)
                    state = None
                if not under_way:
                    return
                emitted = distributed.fetch(under_way.popleft())
                yield emitted
                if emitted.all_done:
                    if state is not None:
                        self._kept_caches.keep(state.cache)
                    return
        except BaseException as error:
            # The last step may have taken the cache, or spoilt it. Where the generator is closed, a cache in use is
            # lost: the end of the interpreter closes it, too, and no program may start there.
            if not isinstance(error, GeneratorExit):
                self._kept_caches.clear()
            raise

    def _start(self, phase: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls a jitted phase: returns once it has begun, or will begin next, on all devices."""
        with _STARTING:
            return phase(*args, **options, **self._static)

    def _empty_hidden(self, rows: int) -> jax.Array:
        if rows not in self._no_hidden:
            self._no_hidden[rows] = decoding.no_hidden(rows, **self._static)
        return self._no_hidden[rows]

    def _prefill(self, slots: Sequence[_Request | None]) -> tuple[DecodeState, Emitted]:
        """Reads the prompts of a batch into a new cache and samples their first tokens; None is a row of padding."""
        rows = [_PADDING if request is None else request for request in slots]
        capacity = self.cache_capacity([(len(row.prompt_ids), row.max_new_tokens) for row in rows])
        cache = self._kept_caches.take(len(rows), capacity)
        last_hidden = self._empty_hidden(len(rows))
        if self.deterministic:
            cache, last_hidden = self._read_one_by_one(slots, cache, last_hidden)
        else:
            cache, last_hidden = self._read([row.prompt_ids for row in rows], cache, last_hidden)
        return self._start(
            decoding.start_decode,
            self.leaves,
            cache,
            last_hidden,
            np.array([row.max_new_tokens for row in rows], np.int32),
            np.array([row.params.ignore_eos for row in rows]),
            RowSampling.from_params([row.params for row in rows]),
        )

    def _read(
        self, prompts: Sequence[Sequence[int]], cache: KVCache, last_hidden: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        """Reads prompts into a cache of as many rows; gives back what `decoding.prefill` does."""
        for chunks in pack_prompts(prompts, num_shards=self.mesh.shape["data"], num_stages=self.mesh.shape["pipe"]):
            cache, last_hidden = self._start(decoding.prefill, self.leaves, cache, last_hidden, chunks)
        return cache, last_hidden

    def _read_one_by_one(
        self, slots: Sequence[_Request | None], cache: KVCache, last_hidden: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        """`_read`, each prompt by programs that its length alone decides: beside none, into a cache of its own that is
        copied to the prompt's place in the batch."""
        num_shards = self.mesh.shape["data"]
        for slot, request in enumerate(slots):
            if request is None:
                continue
            shard, row = divmod(slot, len(slots) // num_shards)
            prompts = [request.prompt_ids if other == shard else () for other in range(num_shards)]
            capacity = self.cache_capacity([(len(request.prompt_ids), 1)])
            own_cache = self._kept_caches.take(num_shards, capacity)
            own_cache, own_hidden = self._read(prompts, own_cache, self._empty_hidden(num_shards))
            rows = jnp.asarray(np.where(np.arange(num_shards) == shard, row, -1).astype(np.int32))
            cache, last_hidden = decoding.put_row(cache, last_hidden, own_cache, own_hidden, rows, **self._static)
            self._kept_caches.keep(own_cache)
        return cache, last_hidden

    def _pack_whole(self, slots: Sequence[Sequence[int] | None], num_chunks: int) -> Packed:
        """Rows that are read at once and not gone on with; None is a row of padding."""
        rows = [() if row is None else row for row in slots]
        return pack_whole(rows, num_shards=self.mesh.shape["data"], num_chunks=num_chunks)

    def _scored_together(self, lens: Sequence[int]) -> Iterator[list[int]]:
        """Groups texts that fit the devices, long ones first, into as many tokens as prefill reads at a time."""
        group: list[int] = []
        self._kept_caches.clear()
        free = self._free_bytes() + self._kept_caches.set_aside
        most = 1 if self.deterministic else self.max_batch_size
        for index in sorted(range(len(lens)), key=lambda index: lens[index], reverse=True):
            num_tokens = sum(lens[other] for other in group) + lens[index]
            of_shard = max(lens[index], num_tokens // self.mesh.shape["data"])
            needed = self._score_bytes(of_shard, len(group) + 1)
            if group and (len(group) == most or of_shard > CHUNK_TOKENS or needed > free):
                yield group
                group = []
            elif needed > free:
                raise _too_large(f"prompt {index} of {lens[index]} tokens", needed, free)
            group.append(index)
        yield group

    def cache_capacity(self, lens: Sequence[tuple[int, int]]) -> int:
        """Tokens a row of the cache must hold, in whole pages; the last token of a row is never stored."""
        longest = max(prompt_len + new_len - 1 for prompt_len, new_len in lens)
        most = kv_cache.pages_per_row(self.config.max_len) * kv_cache.PAGE_LEN
        # Every step reads all of it, so that the steps between buckets are halved: 1, 2, 3, 4, 6, 8, 12 ... pages.
        return min(power_bucket(longest, kv_cache.PAGE_LEN), power_bucket(longest, 3 * kv_cache.PAGE_LEN), most)

    def _batches(self, requests: Sequence[_Request]) -> Iterator[list[_Request]]:
        """Groups requests into batches that fit the device; longest prompts first, so that rows of a batch are alike
        and need caches of one size. In deterministic mode only those share a batch that run the same programs."""
        alike: dict[Any, list[_Request]] = {}
        for request in sorted(requests, key=lambda request: len(request.prompt_ids), reverse=True):
            alike.setdefault(self._programs(request) if self.deterministic else None, []).append(request)
        for order in alike.values():
            yield from self._fitting_batches(order)

    def _programs(self, request: _Request) -> tuple[int, bool]:
        """What a request's decode steps are compiled for, in a batch of requests alike."""
        return self.cache_capacity([(len(request.prompt_ids), request.max_new_tokens)]), request.params.temperature == 0

    def _fitting_batches(self, order: list[_Request]) -> Iterator[list[_Request]]:
        while order:
            size = self.max_batch_size
            while True:
                group = order[:size]
                lens = [(len(request.prompt_ids), request.max_new_tokens) for request in group]
                needed = self._batch_bytes(lens)
                free = self._free_bytes()
                if free < needed <= free + self._kept_caches.set_aside:
                    self._kept_caches.give_way()
                    free = self._free_bytes()
                if needed <= free:
                    break
                if len(group) == 1:
                    ((prompt_len, new_len),) = lens
                    what = f"prompt {group[0].index} of {prompt_len} tokens with {new_len} new ones"
                    if self.deterministic:
                        what += f", in a batch of max_batch_size {self.max_batch_size},"
                    raise _too_large(what, needed, free)
                size = power_bucket(len(group), 1) // 2  # the next smaller bucket, full
            yield group
            order = order[size:]

    def _batch_bytes(self, lens: Sequence[tuple[int, int]]) -> int:
        """Device memory that a batch of (prompt, new) lengths needs beside the weights: its cache, a chunk of prefill
        and the logits."""
        num_rows = self.max_batch_size if self.deterministic else len(lens)
        batch = power_bucket(num_rows, self.mesh.shape["data"] * self.mesh.shape["pipe"])
        capacity, split = self.cache_capacity(lens), Split.of(self.mesh)
        rows_per_shard = batch // self.mesh.shape["data"] + self.deterministic  # that which is read alone
        cache = rows_per_shard * kv_cache.cache_bytes_per_row(self.config, capacity, split)
        num_tokens = min(sum(prompt_len for prompt_len, _ in lens), CHUNK_TOKENS)
        return cache + self._forward_bytes(num_tokens, batch) + 2 * batch * self.config.vocab_size * 4

    def _score_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Likewise of texts that are scored together."""
        config = self.config
        most_len = num_tokens + num_rows * kv_cache.PAGE_LEN  # a page of each row may be nearly empty
        scratch = kv_cache.cache_bytes_per_row(config, most_len) // config.num_layers
        logits = 2 * decoding.SCORE_BLOCK * config.vocab_size * 4
        return scratch + self._forward_bytes(num_tokens, num_rows) + logits

    def _forward_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Largest activations of a forward over so many packed tokens of so many rows."""
        config, num_tokens = self.config, bucket(num_tokens)
        # A layer's products in the model's dtype, the residual stream in f32.
        widths = (4 * config.model_dim + 2 * config.ffn_dim) * config.jax_dtype.itemsize + 3 * config.model_dim * 4
        needed = num_tokens * widths + 2 * SCORE_BYTES
        # Attention's output, tile by tile: a tile of each row may be nearly empty.
        needed += 3 * (num_tokens + num_rows * QUERY_BLOCK) * config.model_dim * config.jax_dtype.itemsize
        if config.quant != "none":
            # Of a product over whole sequences: a tile of its weights in the dtype, and the tile's sums in f32.
            needed += model.TILE_SIZE * (config.jax_dtype.itemsize + num_tokens * 4 // config.model_dim)
        return needed

    def _free_bytes(self) -> float:
        """Memory that a batch may take on the fullest device; what is set aside for kept caches is not in it. The same
        in all processes."""
        return distributed.smallest(_unused_bytes(self.mesh.local_devices) + self._kept_caches.bytes_for_others())


def _resolve_ops(
    config: ModelConfig, implementation: Choice, mesh: Mesh, max_batch_size: int, deterministic: bool
) -> OpsConfig:
    num_data, split = mesh.shape["data"], Split.of(mesh)
    return resolve_ops(
        config,
        implementation,
        platform=mesh.devices.flat[0].platform,
        num_shards=split.num_shards,
        num_stages=split.num_stages,
        max_rows=power_bucket(max_batch_size, num_data * split.num_stages) // num_data,
        deterministic=deterministic,
        devices=sharding.cuda_devices(mesh),
    )


def _check_nan_guard(nan_guard: bool) -> None:
    if nan_guard and jax.process_count() > 1:
        raise InputError("nan_guard needs all devices in one process: each sees only what its own compute")


def _fetched(emitted: Emitted) -> Emitted:
    """On its way to the host as soon as it is there."""
    for array in jax.tree.leaves(emitted):
        array.copy_to_host_async()
    return emitted


def perplexity(nats: float) -> float:
    """exp of the mean negative log-probability; infinite where that exceeds a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def resolve_eos(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The configuration with the end-of-text ids that a model with this tokenizer runs with.

    Those of the checkpoint count, as in Hugging Face's ``generate``. Only where it has none, or no other than GPT-J's
    default 50256, which is a plain word in other vocabularies, the tokenizer knows better.
    """
    is_default = config.eos_token_ids in ((), (_GPTJ_DEFAULT_EOS,))
    if is_default and tokenizer is not None and tokenizer.eos_id is not None:
        return dataclasses.replace(config, eos_token_ids=(tokenizer.eos_id,))
    return config


def _check_max_batch_size(max_batch_size: int) -> None:
    if not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise InputError(f"max_batch_size must be at least 1, got {max_batch_size!r}")


def _too_large(what: str, needed: float, free: float) -> InputError:
    return InputError(f"{what} needs {needed / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} GiB are free")


def _unused_bytes(devices: Sequence[Any]) -> float:
    """Memory left on the fullest device; on a CPU what the host has available."""
    stats = [device.memory_stats() for device in devices]
    return min(s["bytes_limit"] - s["bytes_in_use"] if s else _available_host_bytes() for s in stats)


def _available_host_bytes() -> float:
    """Memory that Linux can give without swapping; unlimited on systems that do not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
