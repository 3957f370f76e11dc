"""The model that ships, and the script that made it."""

import functools
import hashlib
import json
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kogpt_jax import DEMO, InputError, KoGPT, ModelConfig, checkpoint
from kogpt_jax.demo import DIRECTORY, data, export, train
from kogpt_jax.model import model_def, random_leaves
from kogpt_jax.sharding import make_mesh
from kogpt_jax.tokenizer import load_tokenizer

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
TINY = ModelConfig(
    vocab_size=64,
    max_len=64,
    model_dim=16,
    num_layers=1,
    num_heads=2,
    rotary_dim=4,
    ffn_dim=24,
    eos_token_ids=(data.EOS_ID,),
    dtype="fp32",
)


def read_results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


class TestShipped:
    def test_directory(self):
        assert ModelConfig.from_hf_dir(DIRECTORY, dtype="fp16") == DEMO
        shards = sorted(DIRECTORY.glob("*.safetensors"))
        assert len(shards) == 2
        assert (DIRECTORY / "model.safetensors.index.json").is_file()
        assert sum(shard.stat().st_size for shard in shards) < 22e6
        digests = {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}
        assert digests == read_results(export.FIGURES_FILE)["weights_sha256"]

    def test_tokenizer(self):
        tokenizer = load_tokenizer(DIRECTORY)
        assert tokenizer.vocab_size == DEMO.vocab_size
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id, tokenizer.mask_id) == (
            *(0, data.EOS_ID, 2, 3, 4),
        )
        digest = hashlib.sha256((DIRECTORY / "tokenizer.model").read_bytes()).hexdigest()
        assert digest == read_results(export.FIGURES_FILE)["data"]["sha256"]["tokenizer.model"]

    @pytest.mark.slow
    def test_writes_korean(self):
        engine = KoGPT.from_pretrained("demo")
        assert engine.config == DEMO
        (completion,) = engine.generate("이 영화는")
        assert completion.text is not None
        is_hangul = ["가" <= character <= "힣" for character in completion.text.replace(" ", "")]
        assert sum(is_hangul) > len(is_hangul) / 2 > 2

    def test_text_is_likelier_than_its_words_in_disorder(self):
        engine = KoGPT.from_pretrained("demo")
        in_order, in_disorder = engine.score(
            ["정말 재미있게 봤습니다. 감동적인 영화였어요.", "영화였어요. 봤습니다. 정말 감동적인 재미있게"]
        )
        in_order_total, in_disorder_total = (
            sum(logprob for logprob in score.logprobs if logprob is not None) for score in (in_order, in_disorder)
        )
        assert in_order_total > in_disorder_total + 3

    def test_beats_five_characters_on_the_same_held_out_text(self):
        ours, baseline = read_results(export.FIGURES_FILE)["heldout"], read_results("char_ngram.json")["heldout"]
        assert (ours["documents"], ours["characters"]) == (baseline["documents"], baseline["characters"])
        assert ours["bits_per_char"] < baseline["bits_per_char"]

    def test_card_is_made_from_the_figures(self):
        baseline_bits = read_results("char_ngram.json")["heldout"]["bits_per_char"]
        card = export.model_card(read_results(export.FIGURES_FILE), baseline_bits)
        assert (DIRECTORY / export.CARD_FILE).read_text(encoding="utf-8") == card


class TestTraining:
    def test_what_each_mode_sees(self):
        modes = jnp.arange(3)
        seen = train.visible(jnp.array([[1, 5, 6, 1, 7]] * 3), modes)[:, 0].astype(int).tolist()
        assert seen == [
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
            [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]],
            np.tri(5, dtype=int).tolist(),
        ]

    def test_packed_rows_are_documents_measured_one_by_one(self):
        rng = np.random.default_rng(0)
        stream = random_stream(rng, num_documents=6)
        mesh, definition = make_mesh(), model_def(TINY)
        leaves = random_leaves(TINY, mesh, seed=3, std=0.3)
        measured = data.measure(leaves, definition, mesh, stream, num_chars=len(stream), batch=4)
        config = train.TrainConfig(steps=1, chunk=1, warmup_steps=0, dropout=0.0, dtype="fp32")
        scalar = PartitionSpec()
        packed_loss = jax.jit(
            jax.shard_map(
                functools.partial(train.loss, config=config, definition=definition),
                mesh=mesh,
                in_specs=(definition.leaf_specs(), scalar, scalar, scalar),
                out_specs=scalar,
                check_vma=False,
            )
        )(leaves, jnp.asarray(stream[None], jnp.int32), jnp.zeros(1, jnp.int32), jax.random.key(0))
        assert math.log(measured.perplexity) == pytest.approx(float(packed_loss), rel=1e-5)
        assert (measured.documents, measured.tokens) == (6, len(stream) - 1)
        nats = math.log(measured.perplexity) * measured.tokens
        assert measured.bits_per_char == pytest.approx(nats / math.log(2) / len(stream))

    @pytest.mark.slow
    def test_from_streams_to_a_model_directory(self, tmp_path):
        rng = np.random.default_rng(1)
        for name in data.SPLITS:
            np.save(tmp_path / f"{name}.npy", random_stream(rng, num_documents=40))
        split = {"documents": 40, "tokens": 400, "characters": 800}
        (tmp_path / "data.json").write_text(json.dumps(dict.fromkeys(data.SPLITS, split)))
        config = train.TrainConfig(
            steps=30, batch=8, row_len=32, warmup_steps=2, chunk=10, learning_rate=0.01, dtype="fp32"
        )
        result = train.train(TINY, config, tmp_path, tmp_path / "run", log=lambda line: None)
        assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]
        # Chunks after the first find their program.
        assert train.train_chunk._cache_size() == 1  # type: ignore[attr-defined]  # not in JAX's stubs
        figures = export.export([tmp_path / "run"], tmp_path, tmp_path / "out", DIRECTORY / "tokenizer.model")
        assert figures["heldout"]["perplexity"] < TINY.vocab_size
        assert checkpoint.load_config(tmp_path / "out") == TINY
        assert len(checkpoint.load_leaves(tmp_path / "out", TINY, make_mesh())) == len(model_def(TINY).params)
        assert f"{figures['heldout']['perplexity']:.2f} a token" in (tmp_path / "out" / export.CARD_FILE).read_text()

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"steps": 0}, "steps"),
            ({"steps": 250}, "chunk"),
            ({"warmup_steps": 4000}, "warmup_steps"),
            ({"dropout": 1.0}, "dropout"),
            ({"ema_decay": 1.0}, "ema_decay"),
        ],
    )
    def test_bad_settings_are_named(self, settings, words):
        with pytest.raises(InputError, match=words):
            train.TrainConfig(**settings)

    def test_missing_data_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"train\.npy is missing"):
            data.load(tmp_path)
        with pytest.raises(InputError, match=r"reviews\.train\.txt"):
            list(data.train_lines(tmp_path))


def test_prepared_streams_hold_the_lines(tmp_path):
    lines = {
        data.TRAIN_FILES[0]: [f"정말 재미있는 영화 {number}편" for number in range(200)],
        data.TRAIN_FILES[1]: ["", "  제1조 대한민국은 민주공화국이다.\r"],
        data.HELDOUT_FILE: ["감동적입니다 ㅠㅠ 😀"],
    }
    for name, text in lines.items():
        (tmp_path / name).write_text("\n".join(text) + "\n", encoding="utf-8", newline="")
    facts = data.prepare(tmp_path, DIRECTORY / "tokenizer.model", tmp_path / "out")
    streams, loaded_facts = data.load(tmp_path / "out")
    assert loaded_facts == facts
    tokenizer = load_tokenizer(DIRECTORY)
    ids = streams["heldout"].tolist()
    assert ids[0] == ids[-1] == data.EOS_ID
    assert tokenizer.decode(ids) == lines[data.HELDOUT_FILE][0]
    assert facts["heldout"] == {"documents": 1, "tokens": len(ids), "characters": len(lines[data.HELDOUT_FILE][0]) + 1}
    # Lines 0 and 160 are for validation; the constitution's one line is there four times.
    assert (facts["validation"]["documents"], facts["train"]["documents"]) == (2, 198 + 4)


def test_ngram_probabilities_sum_to_one():
    rng = np.random.default_rng(2)
    # Zipf's law, so that there are n-grams of every small count.
    alphabet = np.array([chr(code) for code in range(ord("가"), ord("가") + 1000)])
    odds = 1 / np.arange(1, 1001) ** 1.3
    lines = ["".join(rng.choice(alphabet, rng.integers(1, 20), p=odds / odds.sum())) for _ in range(2000)]
    model = runpy.run_path(str(BENCHMARKS / "char_ngram.py"))["CharNgram"](lines)
    num_unseen = 0x110000 - 0x800 - len(model.codes)
    for context in ("", "가", "각갂", "가가각각가", "ZZ", "가Z각"):
        after = len(context)
        total = 2 ** -model.bits([context])[after] + num_unseen * 2 ** -model.bits([context + "Z"])[after]
        total += sum(2 ** -model.bits([context + chr(code)])[after] for code in model.codes)
        assert total == pytest.approx(1.0, abs=1e-9)


def random_stream(rng: np.random.Generator, num_documents: int) -> np.ndarray:
    documents = [rng.integers(5, TINY.vocab_size, rng.integers(1, 12)) for _ in range(num_documents)]
    return np.concatenate([[data.EOS_ID], *([*document, data.EOS_ID] for document in documents)]).astype(np.uint16)
