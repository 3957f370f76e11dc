"""Tokenizers: special tokens, round trips, and streams that never break a character.

The vocabularies are trained here, small enough that most syllables fall apart into bytes. The libraries' decoders are
the oracles of ``decode``; ``decode`` is the oracle of the incremental decoder.
"""

import functools
import io
import json
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from kogpt_jax.errors import InputError
from kogpt_jax.tokenizer import (
    KOGPT_SPECIAL_TOKENS,
    IncrementalDecoder,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)

SPECIAL_NAMES = list(KOGPT_SPECIAL_TOKENS.values())
SYLLABLES = "".join(chr(code) for code in range(0xAC00, 0xD7A4))  # all 11,172
CORPUS = [
    "나는 오늘 학교에 갔다. 날씨가 좋아서 기분이 좋았다!",
    "서울은 대한민국의 수도이다. 인구는 약 940만 명이다.",
    "The quick brown fox  jumps over 13 lazy dogs, and then some.",
    "이 영화는 정말 재미있다. 다시 보고 싶은 영화 1위.",
]
TEXTS = [
    "",
    "안녕하세요, KoGPT!",
    "가나다abc 123  두 칸   세 칸",
    "줄\n바꿈\n\n탭\t끝\n",
    " 앞의 빈칸",
    "뒤의 빈칸 ",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇰🇷 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 끝",
    "ㄱㄴㄷ ㅏㅑ 옛말 ᄒᆞᆫ글 漢字 ｆｕｌｌ Ünïcödé",
    "한국어(韓國語)는 Korean이다… “따옴표” — 긴 줄표",
    "[EOS] <|endoftext|> [UNK]",
    "null\0 and \ufffd itself",
]
DEMO = pathlib.Path(__file__).parent.parent / "kogpt_jax" / "demo" / "tokenizer.model"


def train_sentencepiece(path: pathlib.Path, *, ids=(0, 1, 2, 3), names=tuple(SPECIAL_NAMES), **options) -> pathlib.Path:
    """A unigram model with byte fallback; control pieces [BOS] [EOS] [UNK] [PAD] [MASK] at 0 to 4."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(CORPUS * 20),
            "model_writer": model,
            "vocab_size": 360,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "character_coverage": 0.98,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            **dict(zip(("bos_id", "eos_id", "unk_id", "pad_id"), ids, strict=True)),
            **dict(zip(("bos_piece", "eos_piece", "unk_piece", "pad_piece"), names, strict=False)),
            "control_symbols": list(names[4:]),
            "num_threads": 1,
            "minloglevel": 2,
            **options,
        }
    )
    path.write_bytes(model.getvalue())
    return path


def save_tokenizer_json(path: pathlib.Path, model, decoder, pre_tokenizer=None, special=SPECIAL_NAMES) -> pathlib.Path:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoder
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
    return path


def train_byte_level(path: pathlib.Path, special=SPECIAL_NAMES) -> pathlib.Path:
    """A byte-level BPE, whose tokens cut through characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens(["덧붙인 말"])  # not spelt in the byte alphabet
    tokenizer.save(str(path))
    return path


def byte_fallback_vocabulary() -> dict[str, int]:
    tokens = [
        "\u2581",
        "가",
        "나",
        "a",
        "b",
        "\u2581a",
        "\u2581\u2581",
        ".",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    return {token: i for i, token in enumerate(tokens)}


def convert_byte_fallback(path: pathlib.Path) -> pathlib.Path:
    """The form in which Hugging Face keeps SentencePiece BPE models."""
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback_vocabulary(), [("\u2581", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL_NAMES)
    tokenizer.save(str(path))
    return path


def word_vocabulary() -> dict[str, int]:
    words = ["가", "나", "##다", "\u2581가", "\u2581", "a", ".", "n't", "!"]
    return {word: i for i, word in enumerate(words)}


def make_word_level(path: pathlib.Path, decoder) -> pathlib.Path:
    model = models.WordLevel({**word_vocabulary(), "[UNK]": 9}, unk_token="[UNK]")
    return save_tokenizer_json(path, model, decoder, pre_tokenizers.Whitespace())


MAKERS = {
    "sentencepiece": lambda tmp: train_sentencepiece(tmp / "tokenizer.model"),
    "byte_level": lambda tmp: train_byte_level(tmp / "tokenizer.json"),
    "byte_fallback": lambda tmp: convert_byte_fallback(tmp / "tokenizer.json"),
    # Decoding only: spaces at the start are treated in three ways, and [UNK] stands for text.
    "sentencepiece_trimming": lambda tmp: train_sentencepiece(tmp / "trim.model", remove_extra_whitespaces=True),
    "sentencepiece_no_prefix": lambda tmp: train_sentencepiece(tmp / "bare.model", add_dummy_prefix=False),
    "sentencepiece_no_bytes": lambda tmp: train_sentencepiece(tmp / "chars.model", byte_fallback=False),
    "sentencepiece_symbols": lambda tmp: train_sentencepiece(
        tmp / "symbols.model", user_defined_symbols=["\u2581\u2581", " x", "<br>"]
    ),
    "sentencepiece_bpe": lambda tmp: train_sentencepiece(tmp / "bpe.model", model_type="bpe"),
    "metaspace": lambda tmp: make_word_level(tmp / "tokenizer.json", decoders.Metaspace()),
    "word_piece": lambda tmp: make_word_level(tmp / "tokenizer.json", decoders.WordPiece()),
    "no_decoder": lambda tmp: make_word_level(tmp / "tokenizer.json", None),
    "demo": lambda tmp: DEMO,
}
LOSSLESS = ["sentencepiece", "byte_level", "byte_fallback", *(["demo"] if DEMO.is_file() else [])]
ALL = [name for name in MAKERS if name != "demo" or DEMO.is_file()]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Name to loaded tokenizer, each made once."""
    cache: dict[str, Tokenizer] = {}

    def make(name: str) -> Tokenizer:
        if name not in cache:
            cache[name] = load_tokenizer(MAKERS[name](tmp_path_factory.mktemp(name)))
        return cache[name]

    return make


@functools.cache
def library(path: pathlib.Path):
    """The same tokenizer as the library itself loads it."""
    if path.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    return tokenizers.Tokenizer.from_file(str(path))


def stream(tokenizer: Tokenizer, pushes: list[list[int]], **options) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, **options)
    return [*(decoder.push(ids) for ids in pushes), decoder.flush()]


# --- Whole characters, always ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_hangul_syllable_streams_whole(made, name):
    """All syllables in one text, one token a push: each part is a whole number of the characters that come next."""
    tokenizer = made(name)
    ids = tokenizer.encode(SYLLABLES)
    parts = stream(tokenizer, [[token_id] for token_id in ids])
    assert "".join(parts) == SYLLABLES  # so no part holds a U+FFFD either
    assert parts[-1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSLESS if name != "byte_fallback"])
def test_every_hangul_syllable_by_itself_splits_at_every_boundary(made, name):
    """Each syllable after a letter, cut at each token boundary: the halves join to the text and hold no U+FFFD."""
    tokenizer = made(name)
    for syllable in SYLLABLES:
        text = f"a{syllable}"
        ids = tokenizer.encode(text)
        for cut in range(len(ids)):
            decoder = IncrementalDecoder(tokenizer)
            head, tail = decoder.push(ids[:cut]), decoder.push(ids[cut:])
            assert text.startswith(head)
            assert head + tail == text


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips_and_splits_at_every_boundary(made, name, text):
    tokenizer = made(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)
    for cut in range(len(ids) + 1):
        parts = stream(tokenizer, [ids[:cut], ids[cut:]])
        assert "".join(parts) == text
        assert text.startswith(parts[0])
        assert parts[-1] == ""
        # The same cut as prompt and completion, wherever the prompt ends on a whole character.
        prompt, continuation = tokenizer.decode(ids[:cut]), tokenizer.decode_continuation(ids[:cut], ids[cut:])
        if prompt == parts[0]:
            assert prompt + continuation == text


def text_strategy() -> st.SearchStrategy[str]:
    # U+2581 is how SentencePiece spells a space: a text that holds it comes back with spaces.
    hangul = st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3)
    anything = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
    return st.text(st.one_of(hangul, anything, st.sampled_from(" \n aZ0😀")))


@pytest.mark.parametrize("name", LOSSLESS)
@hypothesis.given(text=text_strategy())
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_text_round_trips(made, name, text):
    tokenizer = made(name)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- Any ids, valid or not ------------------------------------------------------------------------------------------


@functools.cache
def ids_strategy(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids that favour what is delicate: special tokens, bytes that open and continue characters, spaces."""
    everything = st.integers(0, tokenizer.vocab_size - 1)
    by_text = {token_id: tokenizer.decode([token_id], skip_special=False) for token_id in range(tokenizer.vocab_size)}
    delicate = [i for i, text in by_text.items() if i in tokenizer.special_ids or "\ufffd" in text or not text.strip()]
    return st.lists(st.one_of(everything, st.sampled_from(delicate)) if delicate else everything, max_size=30)


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_stream_is_decode_for_any_ids_and_splits(made, name, data):
    tokenizer = made(name)
    ids = data.draw(ids_strategy(tokenizer))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    pushes = [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    whole = tokenizer.decode(ids, skip)
    parts = stream(tokenizer, pushes, skip_special=skip)
    assert "".join(parts) == whole
    # What is out is final, and at most one character of at most 3 bytes is held.
    seen = 0
    for i, part in enumerate(parts):
        seen += len(part)
        held = tokenizer.decode(sum(pushes[: i + 1], []), skip)[seen:]
        assert set(held) <= {"\ufffd"}
        assert len(held) <= 3


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_decode_is_what_the_library_decodes(made, name, data):
    tokenizer = made(name)
    ids = data.draw(ids_strategy(tokenizer))
    expected = library(tokenizer.path).decode(ids)
    text = tokenizer.decode(ids)
    if name == "byte_fallback" and "\ufffd" in expected:  # the library drops whole characters beside a broken byte
        assert len(text) <= len(expected)
    else:
        assert text == expected
    if tokenizer.path.suffix == ".json" and name != "byte_fallback":
        assert tokenizer.decode(ids, skip_special=False) == library(tokenizer.path).decode(
            ids, skip_special_tokens=False
        )


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("sentencepiece")])
def test_spaces_at_the_start(made, name):
    """None, one or all of them go, as the model was trained, and special tokens between them change nothing."""
    tokenizer = made(name)
    a, space = (library(tokenizer.path).piece_to_id(piece) for piece in ("a", "\u2581"))
    for ids in ([space], [space, a], [space] * 2, [space, space, a], [space, tokenizer.bos_id, space, a], [a, space]):
        for prefix in ([], [tokenizer.bos_id], [tokenizer.unk_id]):
            assert tokenizer.decode(prefix + ids) == library(tokenizer.path).decode(prefix + ids)


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_continuation_is_what_follows_the_prompt(made, name, data):
    tokenizer = made(name)
    prompt, new = data.draw(ids_strategy(tokenizer)), data.draw(ids_strategy(tokenizer))
    continuation = tokenizer.decode_continuation(prompt, new)
    whole = tokenizer.decode(prompt + new)
    assert whole.endswith(continuation)
    # The prompt's share is its whole characters: what a decoder gives before it is flushed.
    assert IncrementalDecoder(tokenizer).push(prompt) + continuation == whole
    assert "".join(stream(tokenizer, [[token_id] for token_id in new], prefix_ids=prompt)) == continuation


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """The ids of single bytes in a SentencePiece model."""
    return [library(tokenizer.path).piece_to_id(f"<0x{byte:02X}>") for byte in raw]


def test_broken_bytes_are_not_held(made):
    """A byte that can no longer become a character comes out with the token that settles it, not at the end."""
    tokenizer = made("sentencepiece")
    decoder = IncrementalDecoder(tokenizer)
    outs = [decoder.push([token_id]) for token_id in byte_ids(tokenizer, b"\xff\xea\xb0\xea\xb0\x80\xf0\x9f\x98A")]
    assert outs == ["\ufffd", "", "", "\ufffd\ufffd", "", "가", "", "", "", "\ufffd\ufffd\ufffdA"]
    assert decoder.flush() == ""


def test_prompt_that_ends_inside_a_character(made):
    """The unfinished character belongs to what follows: whole if it is finished there, else as U+FFFD."""
    tokenizer = made("sentencepiece")
    first, second, third = byte_ids(tokenizer, "힣".encode())
    prompt = [*tokenizer.encode("가"), first, second]
    assert tokenizer.decode_continuation(prompt, [third]) == "힣"
    assert tokenizer.decode_continuation(prompt, tokenizer.encode("a")) == "\ufffd\ufffd a"
    assert tokenizer.decode_continuation(prompt, []) == "\ufffd\ufffd"


def test_continuation_keeps_its_leading_space(made):
    """A decode of the new tokens alone would lose the space that separates them from the prompt."""
    tokenizer = made("sentencepiece")
    prompt, new = tokenizer.encode("오늘"), tokenizer.encode("날씨")
    assert tokenizer.decode(new) == "날씨"
    assert tokenizer.decode_continuation(prompt, new) == " 날씨"
    assert tokenizer.decode_continuation([], new) == "날씨"


def test_cost_of_a_token_does_not_grow(made):
    """20,000 tokens one by one: a decoder that went back over the text would take minutes."""
    for name in ("sentencepiece", "byte_level"):
        tokenizer = made(name)
        ids = tokenizer.encode(SYLLABLES[:2000]) * 4
        decoder = IncrementalDecoder(tokenizer)
        for token_id in ids[:20_000]:
            decoder.push([token_id])
            assert len(decoder._pending) <= 3


# --- Special tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_special_tokens_are_found_and_skipped(made, name):
    tokenizer = made(name)
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id, tokenizer.mask_id]
    assert None not in ids
    assert len(set(ids)) == 5
    assert set(ids) == tokenizer.special_ids
    a = tokenizer.encode("가나")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert tokenizer.decode([bos, *a, eos, tokenizer.pad_id, tokenizer.mask_id]) == "가나"
    assert tokenizer.decode([*a, eos], skip_special=False) == "가나[EOS]"


def test_sentencepiece_special_ids(made):
    tokenizer = made("sentencepiece")
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id, tokenizer.mask_id] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert tokenizer.decode([0, *tokenizer.encode("가"), 1], skip_special=False) == "[BOS]가[EOS]"


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("special", SPECIAL_NAMES)
def test_text_never_becomes_a_special_token(made, name, special):
    tokenizer = made(name)
    text = f"앞{special}뒤 {special}"
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_text_that_can_only_be_a_special_token_is_refused(tmp_path):
    """A Unigram vocabulary with [EOS] as a piece, and a SentencePiece model with [MASK] as a user's symbol."""
    pieces = [("[UNK]", 0.0), ("[EOS]", 0.0), ("\u2581", -2.0), ("a", -2.0)]
    model = models.Unigram(pieces, 0, False)
    path = save_tokenizer_json(tmp_path / "tokenizer.json", model, decoders.Metaspace(), pre_tokenizers.Metaspace())
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a") == [2, 3]
    assert tokenizer.unk_id in tokenizer.encode("b")  # text without a piece is [UNK], and no reason to refuse
    with pytest.raises(InputError, match=r"'\[EOS\]'"):
        tokenizer.encode("a[EOS]")

    path = tmp_path / "user.model"
    tokenizer = load_tokenizer(train_sentencepiece(path, control_symbols=[], user_defined_symbols=["[MASK]", "[USER]"]))
    with pytest.raises(InputError, match=r"'\[MASK\]'"):
        tokenizer.encode("a[MASK]")
    assert tokenizer.decode(tokenizer.encode("a[USER]")) == "a[USER]"


def test_names_come_from_the_files_beside(tmp_path):
    """As in EleutherAI's GPT-J: one token for several roles, named by strings or objects; the first file wins."""
    train_byte_level(tmp_path / "tokenizer.json", special=["<|endoftext|>", "<other>"])
    assert load_tokenizer(tmp_path).eos_id is None  # none of KoGPT's names either
    config = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": None, "mask_token": "absent"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    names = {"bos_token": "<|endoftext|>", "eos_token": "<other>", "pad_token": "<other>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text("{}", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == [0, 0, 1]
    assert [tokenizer.unk_id, tokenizer.mask_id] == [None, None]
    assert [file.name for file in tokenizer.files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ]


@pytest.mark.parametrize("is_added", [False, True])
def test_tokens_become_special_by_name(tmp_path, is_added):
    """KoGPT's names in a tokenizer.json that does not declare them special, as plain entries or as added tokens."""
    model = models.WordLevel({"[UNK]": 0, "[EOS]": 1, "a": 2}, unk_token="[UNK]")
    save_tokenizer_json(tmp_path / "tokenizer.json", model, None, pre_tokenizers.Whitespace(), special=[])
    if is_added:
        stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        stored.add_tokens(["[EOS]"])
        stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 1
    assert tokenizer.decode([2, 1, 2]) == "a a"
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.encode("a [EOS]")[0] == 2
    assert 1 not in tokenizer.encode("a [EOS]")


def test_sentencepiece_own_roles(tmp_path):
    """A model with other names: its own declaration counts; roles that it switches off are None."""
    names = ("<s>", "</s>", "<unk>", "<pad>")
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path / "a.model", ids=(1, 2, 0, -1), names=names))
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id] == [1, 2, 0]
    assert [tokenizer.pad_id, tokenizer.mask_id] == [None, None]
    assert tokenizer.decode([1, *tokenizer.encode("</s>"), 2]) == "</s>"


def test_encode_ignores_template_truncation_and_padding(tmp_path):
    path = train_byte_level(tmp_path / "tokenizer.json")
    plain = load_tokenizer(path).encode("나는 오늘")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[BOS] $0", special_tokens=[("[BOS]", 0)])
    tokenizer.save(str(path))
    assert load_tokenizer(path).encode("나는 오늘") == plain


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level"])
def test_ids_are_checked(made, name):
    tokenizer = made(name)
    for bad in (-1, tokenizer.vocab_size, 10**12):
        with pytest.raises(InputError, match=f"token id {bad} "):
            tokenizer.decode([5, bad])
    with pytest.raises(InputError, match=r"1\.5"):
        tokenizer.decode(value for value in (1.5,))
    a = tokenizer.encode("가")
    assert tokenizer.decode(np.asarray(a, np.int32)) == "가"
    decoder = IncrementalDecoder(tokenizer)
    with pytest.raises(InputError, match="token id -1 "):
        decoder.push([*a, -1])
    assert decoder.push(a) == "가"  # nothing of the refused push was taken


def test_gap_in_the_vocabulary(tmp_path):
    model = models.WordLevel({"a": 0, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = load_tokenizer(save_tokenizer_json(tmp_path / "tokenizer.json", model, None, special=[]))
    assert tokenizer.vocab_size == 3
    with pytest.raises(InputError, match="token id 1 "):
        tokenizer.decode([1])


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level"])
def test_text_is_checked(made, name):
    with pytest.raises(InputError, match=r"U\+D800 at character 1"):
        made(name).encode("a\ud800")


def test_text_must_be_a_string(made):
    """In a process of its own: here the type checker of the test run would be first."""
    code = "import sys; from kogpt_jax.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]).encode(b'text')"
    path = str(made("sentencepiece").path)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "kogpt_jax.errors.InputError: text must be a str, got bytes b'text'"


def refused(path: pathlib.Path, capfd) -> str:
    """The message with which a path is refused: one line, which names the path, and nothing printed by a library."""
    with pytest.raises(InputError) as caught:
        load_tokenizer(path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


def test_missing_paths(tmp_path, capfd):
    assert "does not exist" in refused(tmp_path / "none", capfd)
    assert "does not exist" in refused(tmp_path / "none.model", capfd)
    assert "no tokenizer" in refused(tmp_path, capfd)
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("a", encoding="utf-8")
    assert ".json or .model" in refused(tmp_path / "vocab.txt", capfd)


def test_directory_prefers_json_and_refuses_several_models(tmp_path, made, capfd):
    raw = made("sentencepiece").path.read_bytes()
    (tmp_path / "spiece.model").write_bytes(raw)
    assert find_tokenizer(tmp_path) == tmp_path / "spiece.model"
    assert load_tokenizer(str(tmp_path)).files == (tmp_path / "spiece.model",)
    (tmp_path / "other.model").write_bytes(raw)
    assert "other.model, spiece.model" in refused(tmp_path, capfd)
    (tmp_path / "tokenizer.json").write_bytes(made("byte_level").path.read_bytes())
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no end", "json"])
def test_broken_sentencepiece_model(tmp_path, made, capfd, damage):
    raw = made("sentencepiece").path.read_bytes()
    broken = {"empty": b"", "text": b"not a model\n", "cut": raw[:1000], "no end": raw[:-1], "json": b"{}"}
    path = tmp_path / "tokenizer.model"
    path.write_bytes(broken[damage])
    assert "is not a SentencePiece model: " in refused(path, capfd)


@pytest.mark.parametrize("damage", ["empty", "cut", "array", "no model", "not UTF-8", "merges"])
def test_broken_tokenizer_json(tmp_path, made, capfd, damage):
    raw = made("byte_level").path.read_bytes()
    broken = {
        "empty": b"",
        "cut": raw[:1000],
        "array": b"[]",
        "no model": b"{}",
        "not UTF-8": b"\xff\xfe{}",
        "merges": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    }
    path = tmp_path / "tokenizer.json"
    path.write_bytes(broken[damage])
    refused(path, capfd)


def test_empty_vocabulary(tmp_path, capfd):
    path = save_tokenizer_json(tmp_path / "tokenizer.json", models.BPE(), decoders.ByteLevel(), special=[])
    assert "vocabulary is empty" in refused(path, capfd)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace(tokenizers.Regex("a+"), "b")]),
    ],
    ids=["CTC", "BPEDecoder", "strip at the end", "pattern"],
)
def test_decoder_that_cannot_stream_is_refused(tmp_path, capfd, decoder):
    path = make_word_level(tmp_path / "tokenizer.json", decoder)
    assert "decoder" in refused(path, capfd)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token": 3}', '{"eos_token": {"text": "a"}}'])
def test_broken_companions(tmp_path, made, content):
    (tmp_path / "tokenizer.model").write_bytes(made("sentencepiece").path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer_config\.json") as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_unreadable_file(tmp_path, capfd):
    (tmp_path / "tokenizer.model").mkdir()
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").mkdir()
    assert "no tokenizer" in refused(tmp_path / "tokenizer.json", capfd)


def test_membership_knows_gaps_in_a_vocabulary(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"가": 0, "나": 5}, unk_token="가")).save(str(path))
    tokenizer = load_tokenizer(path)
    assert [token_id for token_id in range(-1, 8) if token_id in tokenizer] == [0, 5]
