"""A model on any mesh of simulated devices is the model on one: logits, texts, one sum a layer, replicas that agree."""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tolerances
from hash_weights import write_checkpoint
from jax.sharding import PartitionSpec
from small_model import CONFIG, KERNEL_CONFIG, greedy, prompt
from test_decoding import make_call

from kogpt_jax import Completion, KoGPT, SamplingParams, checkpoint, decoding, packing, pipeline, quantized_cache
from kogpt_jax.config import ModelConfig
from kogpt_jax.errors import InputError
from kogpt_jax.model import random_leaves
from kogpt_jax.sharding import Split, make_mesh, mesh_name, parse_mesh

EXTENTS = (1, 2, 4, 8)
MESHES = [
    f"d{data}p{pipe}t{tensor}"
    for data, pipe, tensor in itertools.product(EXTENTS, repeat=3)
    if 1 < data * pipe * tensor <= 8
]
# Heads for 8 shards; no mesh divides the vocabulary of 259, and no pipeline the layers.
WIDE = dataclasses.replace(CONFIG, model_dim=64, num_heads=8, ffn_dim=96, num_layers=3, eos_token_ids=())
PROMPTS = [prompt(length) for length in (1, 5, 13, 16)]
NEW_TOKENS = 9  # of prefill and a chunk
MIXED = [
    greedy(NEW_TOKENS),
    *(dataclasses.replace(greedy(NEW_TOKENS), temperature=0.9, top_p=0.9, seed=seed) for seed in range(3)),
]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Groups of one device each: a sum over an axis of extent 1.
ALONE = re.compile(r"replica_groups=(\[\d+,1\]<=|\{(\{\d+\},?)+\})")


def replica_problems(tree: Any) -> list[str]:
    """Which arrays hold different values on devices that should hold the same."""
    problems = []
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        seen: dict[str, bytes] = {}
        for shard in array.addressable_shards:
            content = np.asarray(shard.data).tobytes()
            if seen.setdefault(str(shard.index), content) != content:
                problems.append(f"{jax.tree_util.keystr(path)} {shard.index} differs on {shard.device}")
    return problems


@dataclasses.dataclass
class Watched:
    """What the phases ran and made while they were watched."""

    programs: dict[str, hlo.Module]
    problems: list[str]  # with replicas


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The phases compile once, as ever, but their programs and outputs are looked at."""
    seen = Watched({}, [])

    def watching(name: str, phase: Any) -> Callable:
        @functools.wraps(phase)
        def run(*args: Any, **static: Any) -> Any:
            compiled = phase.lower(*args, **static).compile()
            seen.programs[name] = hlo.Module.parse(compiled.as_text())
            outputs = compiled(*args)
            seen.problems += [f"{name}: {problem}" for problem in replica_problems(outputs)]
            return outputs

        return run

    for name in ("prefill", "start_decode", "decode_loop", "score", "all_logits"):
        monkeypatch.setattr(decoding, name, watching(name, getattr(decoding, name)))
    return seen


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("wide")
    write_checkpoint(directory, WIDE.to_hf_dict(), salt="wide")
    return directory


@dataclasses.dataclass(frozen=True)
class Expected:
    """What one device says."""

    logits: np.ndarray
    greedy: list[Completion]
    mixed: list[Completion]


@pytest.fixture(scope="module")
def expected(directory: pathlib.Path) -> Expected:
    engine = KoGPT.from_pretrained(directory, dtype="fp32")
    return Expected(
        engine.logits(PROMPTS[2]),
        engine.generate_ids(PROMPTS, greedy(NEW_TOKENS)),
        engine.generate_ids(PROMPTS, MIXED),
    )


def check_texts(
    completions: list[Completion],
    expected: list[Completion],
    tolerance: tolerances.Tolerance = tolerances.LOGPROBS_VS_MESH,
) -> None:
    for completion, other in zip(completions, expected, strict=True):
        assert completion.token_ids == other.token_ids
        tolerances.assert_close(completion.logprobs, other.logprobs, tolerance)


def check_collectives(watched: Watched, engine: KoGPT, gathered: int) -> None:
    """No weights and no cache cross the mesh: of whole sequences and of a step one sum for each layer of a stage and
    one for the embedding, and for the choice of tokens a gather of at most ``gathered`` elements a row and shard, and a
    sum over "data" for whether all is done. In a pipeline microbatches are handed on, and the last stage's come to all:
    a tick is compiled once."""
    data, pipe, tensor = (engine.mesh.shape[axis] for axis in ("data", "pipe", "tensor"))
    sums = (tensor > 1) * engine._definition.layers_per_stage + (pipe * tensor > 1)
    gathers, passed_on = int(pipe * tensor > 1), int(pipe > 1)
    wanted = {
        "prefill": {"all-reduce": sums + passed_on, "collective-permute": passed_on},
        "start_decode": {
            "all-reduce": (data > 1) + sums * passed_on,
            "all-gather": gathers,
            "collective-permute": passed_on,
        },
        "decode_loop": {
            "all-reduce": sums + passed_on + (data > 1),
            "all-gather": gathers,
            "collective-permute": passed_on,
        },
    }
    for phase, counts in wanted.items():
        found = [
            instruction
            for instruction in watched.programs[phase].running()
            if instruction.opcode.removesuffix("-start") in COLLECTIVES and not ALONE.search(instruction.rest)
        ]
        found_counts = Counter(instruction.opcode.removesuffix("-start") for instruction in found)
        assert found_counts == {opcode: count for opcode, count in counts.items() if count}, phase
        for instruction in found:
            if instruction.opcode.startswith("all-gather"):
                rows = max(len(PROMPTS), data * pipe) // data
                assert hlo.num_elements(instruction.result) <= gathered * rows * pipe * tensor, instruction


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_is_one_device(directory, expected, watched, name):
    """Odd vocabulary and ragged batch: logits and greedy text. Three numbers of a row and shard say which token it
    is."""
    engine = KoGPT.from_pretrained(directory, dtype="fp32", mesh=name)
    assert mesh_name(engine.mesh) == name
    tolerances.assert_close(engine.logits(PROMPTS[2]), expected.logits, tolerances.LOGITS_VS_MESH)
    check_texts(engine.generate_ids(PROMPTS, greedy(NEW_TOKENS)), expected.greedy)
    check_collectives(watched, engine, gathered=3)
    assert watched.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d2p1t4", "d2p2t2"])
def test_drawn_text_is_the_same_on_any_mesh(directory, expected, watched, name):
    """Beside a greedy row: the batch's logits are gathered, and what follows is what one device does. Scores agree
    too. Few meshes, since sorting takes XLA long to compile; test_vocabulary.py gathers over others."""
    engine = KoGPT.from_pretrained(directory, dtype="fp32", mesh=name)
    check_texts(engine.generate_ids(PROMPTS, MIXED), expected.mixed)
    check_collectives(watched, engine, gathered=engine._definition.vocabulary.shard_len)
    texts = [(*row, *completion.token_ids) for row, completion in zip(PROMPTS, expected.greedy, strict=True)]
    for row, score, completion in zip(PROMPTS, engine.score_ids(texts), expected.greedy, strict=True):
        scored = [logprob for logprob in score.logprobs[len(row) :] if logprob is not None]
        tolerances.assert_close(scored, completion.logprobs, tolerances.CACHED_VS_WHOLE["fp32"], f"{len(row)} tokens")
    assert watched.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d1p2t1", "d1p4t2"])
def test_layers_that_do_not_divide_and_prompts_of_many_chunks(monkeypatch, name):
    """7 layers, some stages with one less; prompts that are read chunk by chunk while others are under way, over more
    than one call of prefill; and texts scored in chunks."""
    config = dataclasses.replace(WIDE, num_layers=7)
    monkeypatch.setattr(packing, "_SMALLEST_CHUNK", 16)
    prompts = [prompt(length, length) for length in (40, 2, 130, 64, 7)]
    one, many = (KoGPT.from_random(config, mesh=mesh, seed=1) for mesh in ("d1p1t1", name))
    expected = one.generate_ids(prompts, greedy(NEW_TOKENS))
    chunks = []
    prefill = decoding.prefill

    def watched(leaves, cache, last_hidden, packed, **static):
        chunks.append(packed.tokens.shape)
        return prefill(leaves, cache, last_hidden, packed, **static)

    monkeypatch.setattr(decoding, "prefill", watched)
    check_texts(many.generate_ids(prompts, greedy(NEW_TOKENS)), expected)
    assert len(chunks) == 1
    assert chunks[0][0] > many.mesh.shape["pipe"]
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 8)
    check_texts(many.generate_ids(prompts, greedy(NEW_TOKENS)), expected)
    assert len(chunks) > 2
    for score, other in zip(many.score_ids(prompts), one.score_ids(prompts), strict=True):
        assert score.token_ids == other.token_ids
        found, wanted = (np.array(each.logprobs[1:], np.float32) for each in (score, other))
        tolerances.assert_close(found, wanted, tolerances.LOGPROBS_VS_MESH)


@pytest.mark.slow
def test_no_stage_of_a_pipeline_idles(monkeypatch):
    """``microbatches x tokens + stages - 1`` ticks for all tokens after the first, and the same text whether rows fill
    the microbatches or not."""
    num_ticks = []

    def counting(num_stages, ticks, *arguments):
        num_ticks.append(len(ticks))
        return pipeline.run_ticks(num_stages, ticks, *arguments)

    monkeypatch.setattr(decoding, "run_ticks", counting)
    config = dataclasses.replace(WIDE, num_layers=4, max_len=WIDE.max_len + 1)  # programs of its own: they are traced
    one, four = (KoGPT.from_random(config, mesh=mesh, seed=2) for mesh in ("d1p1t1", "d1p4t1"))
    for rows in (PROMPTS[:1], PROMPTS):
        check_texts(four.generate_ids(rows, greedy(9)), one.generate_ids(rows, greedy(9)))
    num_ticks.clear()
    longer = dataclasses.replace(config, max_len=config.max_len + 1)
    KoGPT.from_random(longer, mesh="d1p4t1").generate_ids(PROMPTS, greedy(9))
    prefill, fill, loop = num_ticks  # each program is traced once; the loop of 8 tokens is run once
    assert prefill == 1 + 4 - 1
    assert fill + loop == 4 * 8 + 4 - 1


@pytest.mark.slow
def test_the_demo_model_on_eight_devices():
    one, eight = (KoGPT.from_pretrained("demo", dtype="fp32", mesh=mesh) for mesh in ("d1p1t1", "d1p2t4"))
    prompts = ["이 영화는", "정말 재미있게 봤습니다", "배우들의 연기가"]
    params = SamplingParams(max_new_tokens=17)
    expected = one.generate(prompts, params)
    completions = eight.generate(prompts, params)
    assert [completion.text for completion in completions] == [completion.text for completion in expected]
    assert all(completion.text for completion in completions)


# -- Kernels and quantised weights ------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize(("quant", "kv_dtype"), [("none", "int8"), ("w8a16", None), ("w8a8", None)])
def test_kernels_inside_a_mesh(tmp_path, quant, kv_dtype):
    """The project's ops for CPUs on four devices against XLA on one."""
    write_checkpoint(tmp_path, KERNEL_CONFIG.to_hf_dict() | {"n_inner": 224}, salt="kernels")  # K of a shard: 16 x 11
    options = {"dtype": "fp32", "quant": quant, "kv_dtype": kv_dtype, "keep_quantized": False}
    load = functools.partial(KoGPT.from_pretrained, tmp_path, **options)
    one, four = load(implementation="reference"), load(implementation="ffi", mesh="d1p2t2")
    assert four.ops.linear == four.ops.decode_attention == "ffi"
    expected = one.generate_ids(PROMPTS, greedy(NEW_TOKENS))
    completions = four.generate_ids(PROMPTS, greedy(NEW_TOKENS))
    rounds = quant == "w8a8" or kv_dtype == "int8"
    tolerance = tolerances.INT8_VS_MESH if rounds else tolerances.LOGPROBS_VS_MESH
    check_texts(completions, expected, tolerance)


def test_the_cache_is_updated_in_place_on_a_mesh(directory):
    engine = KoGPT.from_pretrained(directory, dtype="fp32", mesh="d2p1t2", implementation="reference")
    call = make_call(engine, "decode_loop")
    compiled = call.donating.lower(*call.args, **call.static).compile()
    local = [pages.addressable_data(0) for pages in jax.tree.leaves((call.cache.k, call.cache.v))]
    assert local[0].shape == (4 * 8 // 2 * 3 + 1, WIDE.num_heads // 2, 64, WIDE.head_dim)
    assert hlo.in_place_problems(compiled, local) == []


# -- Leaves -----------------------------------------------------------------------------------------------------------


def stored(directory: pathlib.Path, config: ModelConfig, leaves: Any, split: Split) -> dict[str, np.ndarray]:
    """A model as a checkpoint has it, which no mesh shows in."""
    directory.mkdir()
    checkpoint.write_leaves(directory, config, leaves, split)
    return safetensors.numpy.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("quant", ["none", "w8a16"])
def test_a_random_model_is_the_same_on_any_mesh(tmp_path, quant):
    config = dataclasses.replace(WIDE, num_layers=3, quant=quant)
    expected = stored(tmp_path / "one", config, random_leaves(config, make_mesh(), seed=3), Split())
    mesh = make_mesh(*parse_mesh("d2p2t2"))
    leaves = random_leaves(config, mesh, seed=3)
    assert replica_problems(leaves) == []
    found = stored(tmp_path / "eight", config, leaves, Split.of(mesh))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[key], err_msg=key)


def test_one_entry_of_quantised_weights_serves_all_meshes(directory, tmp_path, monkeypatch):
    """Made on eight devices, read on four and on one; the values are those of one device."""
    monkeypatch.setattr(quantized_cache, "directory", lambda: tmp_path / "quantized")
    config = dataclasses.replace(checkpoint.load_config(directory), quant="w8a16")
    expected = stored(tmp_path / "one", config, checkpoint.load_leaves(directory, config, make_mesh()), Split())
    for name in ("d1p2t4", "d2p2t1", "d1p1t1"):
        mesh = make_mesh(*parse_mesh(name))
        leaves = quantized_cache.load_leaves(directory, config, mesh)
        assert quantized_cache.size()[0] == 1
        found = stored(tmp_path / name, config, leaves, Split.of(mesh))
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            np.testing.assert_array_equal(tensor, expected[key], err_msg=f"{name} {key}")


# -- What is refused, and what the checks see -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("d1p1t3", "num_heads 8 is not a multiple of the 3 tensor shards"),
        ("d16p1t1", "mesh d16p1t1 needs 16 devices, found 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_weights_are_read(directory, monkeypatch, mesh, message):
    monkeypatch.setattr(checkpoint, "load_leaves", None)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        KoGPT.from_pretrained(directory, mesh=mesh)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        KoGPT.from_random(WIDE, mesh=mesh)


def test_a_forgotten_sum_shows_in_the_replicas():
    x = jnp.arange(8.0)
    for is_summed in (True, False):
        total = jax.shard_map(
            lambda x, is_summed=is_summed: jax.lax.psum(x.sum(), "tensor") if is_summed else x.sum(),
            mesh=make_mesh(tensor=4),
            in_specs=PartitionSpec("tensor"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(x)
        assert (replica_problems([total]) == []) == is_summed
