import base64
import functools
import json
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from model.tokenizer import Tokenizer, load_tokenizer
from tests.assets import ASSETS, needs_assets

FILES = {
    "gpt2": "gpt2_tokenizer.json",
    "llama2": "llama2.model",
    "mistral_v3": "mistral_v3.model",
    "tinystories": "tinystories_tok4096.model",
}
STORIES = ASSETS / "models" / "stories260k-hf"
# No deadline: a machine may be busy.
RELAXED = settings(deadline=None, max_examples=40)
TEXTS = st.text(max_size=60) | st.text("ab \n▁é東😀\u0301\u200d", max_size=30)


def asset(name: str) -> Path:
    return ASSETS / "tokenizers" / FILES[name]


def load(directory: Path, files: dict[str, Path | bytes | dict[str, Any]]) -> Tokenizer:
    """The tokenizer of a directory with these files: copies, bytes or JSON."""
    for name, content in files.items():
        if isinstance(content, Path):
            content = content.read_bytes()
        elif isinstance(content, dict):
            content = json.dumps(content).encode()
        (directory / name).write_bytes(content)
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


@functools.cache
def asset_tokenizer(name: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return load(Path(directory), {f"tokenizer{asset(name).suffix}": asset(name)})


@functools.cache
def stories(file: str) -> Tokenizer:
    """The tokenizer that comes in two files, from one of them."""
    names = (file, "tokenizer_config.json")
    with tempfile.TemporaryDirectory() as directory:
        return load(Path(directory), {name: STORIES / name for name in names})


@functools.cache
def library(name: str) -> Any:
    """The asset as its own library reads it."""
    path = asset(name)
    if path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(path))
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@functools.cache
def golden(name: str) -> list[dict[str, Any]]:
    path = ASSETS / "tokenizers" / f"{name}_golden.json"
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


@needs_assets
@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral_v3"])
def test_ids_and_text_are_the_golden_ones(name):
    tokenizer = asset_tokenizer(name)
    for case in golden(name):
        # The sentencepiece cases were computed with control pieces as plain text.
        ids = tokenizer.encode(case["text"], add_special_tokens=False, parse_special=name == "gpt2")
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids) == case["decoded"]


@needs_assets
def test_the_two_files_of_one_tokenizer_give_the_expected_ids():
    expected = json.loads((STORIES / "expected.json").read_text(encoding="utf-8"))
    for case in expected["cases"]:
        for tokenizer in (stories("tokenizer.json"), stories("tokenizer.model")):
            assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
            ids = case["prompt_ids"] + case["generated_ids"]
            assert tokenizer.decode(ids) == case["prompt"] + case["generated_text"]


@needs_assets
def test_the_two_files_of_one_tokenizer_agree_on_special_tokens():
    of_json, of_model = stories("tokenizer.json"), stories("tokenizer.model")
    texts = [case["text"] for case in golden("llama2")]
    for text in [*texts, "<s>a</s> b<unk>", "<s>", "a</s>"]:
        for flag in (True, False):
            ids = of_json.encode(text, parse_special=flag)
            assert of_model.encode(text, parse_special=flag) == ids
            assert of_model.decode(ids, skip_special_tokens=flag) == of_json.decode(ids, flag)
    for name in ("vocab_size", "special_ids", "bos_id", "eos_ids", "pieces", "leading_spaces"):
        assert getattr(of_json, name) == getattr(of_model, name)


@needs_assets
@RELAXED
@given(text=TEXTS)
def test_text_survives_encoding(text):
    gpt2 = asset_tokenizer("gpt2")
    assert gpt2.decode(gpt2.encode(text)) == text
    for tokenizer in (asset_tokenizer("llama2"), asset_tokenizer("mistral_v3")):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    for tokenizer in (stories("tokenizer.json"), stories("tokenizer.model")):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@needs_assets
@RELAXED
@given(text=TEXTS)
def test_a_tokenizer_that_collapses_spaces_loses_nothing_else(text):
    tokenizer = asset_tokenizer("tinystories")
    text = text.replace("▁", "_")
    collapsed = re.sub(" +", " ", text).strip(" ")
    assert tokenizer.decode(tokenizer.encode(text)) == collapsed


@needs_assets
@RELAXED
@given(data=st.data(), skip=st.booleans())
def test_any_ids_decode_as_in_tokenizers(data, skip):
    # Ids 94 to 255 are single bytes from 0x80 on: mostly invalid UTF-8.
    ids = data.draw(st.lists(st.integers(0, 50256) | st.integers(94, 255)))
    text = asset_tokenizer("gpt2").decode(ids, skip_special_tokens=skip)
    assert text == library("gpt2").decode(ids, skip_special_tokens=skip)


@needs_assets
@pytest.mark.parametrize("name", ["llama2", "mistral_v3", "tinystories"])
@RELAXED
@given(data=st.data())
def test_any_ids_decode_as_in_sentencepiece(name, data):
    tokenizer, reference = asset_tokenizer(name), library(name)
    space = reference.piece_to_id("▁")
    byte = st.integers(0, 255).map(lambda b: reference.piece_to_id(f"<0x{b:02X}>"))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | byte | st.just(space)))
    # Left out: special pieces, which in sentencepiece come between the bytes of a character, and
    # a space spelled as a byte, which it keeps at the beginning of a text.
    odd = tokenizer.special_ids | {reference.piece_to_id("<0x20>")}
    ids = [i for i in ids if i not in odd]
    # Sentencepiece writes U+FFFD for each byte of a broken character, Unicode advises one for all.
    one = re.compile("\ufffd+")
    assert one.sub("?", tokenizer.decode(ids)) == one.sub("?", reference.decode(ids))


@needs_assets
def test_special_tokens_in_the_text_are_ids_unless_asked_otherwise():
    mistral = asset_tokenizer("mistral_v3")
    ids = mistral.encode("<s>[INST] hi [/INST]", add_special_tokens=False)
    assert ids[:2] == [1, 3]
    assert ids[-1] == 4
    assert not {1, 3, 4} & set(mistral.encode("<s>[INST]", False, parse_special=False))
    gpt2 = asset_tokenizer("gpt2")
    assert gpt2.encode("a<|endoftext|>") == [64, 50256]
    assert 50256 not in gpt2.encode("a<|endoftext|>", parse_special=False)


@needs_assets
def test_special_tokens_are_skipped_in_text_unless_asked_otherwise():
    llama2 = asset_tokenizer("llama2")
    ids = [1, *llama2.encode("hi", add_special_tokens=False), 2, 0]
    assert llama2.decode(ids) == "hi"
    assert llama2.decode(ids, skip_special_tokens=False) == "<s> hi</s><unk>"
    assert [llama2.is_special(i) for i in (0, 1, 2, 3)] == [True, True, True, False]


@needs_assets
def test_settings_decide_what_goes_around_a_sentencepiece_text(tmp_path):
    files: dict[str, Any] = {"tokenizer.model": asset("llama2")}
    assert load(tmp_path, files).encode("hi") == [1, 7251]
    files["tokenizer_config.json"] = {"add_bos_token": False, "add_eos_token": True}
    assert load(tmp_path, files).encode("hi") == [7251, 2]
    assert load(tmp_path, files).encode("hi", add_special_tokens=False) == [7251]


@needs_assets
def test_without_legacy_no_prefix_follows_a_special_token(tmp_path):
    files: dict[str, Any] = {"tokenizer.model": asset("llama2")}
    plain, prefixed = 10994, 15043  # "Hello", "▁Hello"
    assert load(tmp_path, files).encode("Hello</s>Hello") == [1, prefixed, 2, prefixed]
    files["tokenizer_config.json"] = {"legacy": False}
    assert load(tmp_path, files).encode("Hello</s>Hello") == [1, prefixed, 2, plain]
    assert load(tmp_path, files).encode("</s>Hello", add_special_tokens=False) == [2, plain]


@needs_assets
def test_tokens_added_to_sentencepiece_are_matched_first(tmp_path):
    tokenizer = load(
        tmp_path,
        {
            "tokenizer.model": asset("llama2"),
            "added_tokens.json": {"<|im_end|>": 32001, "<tool>": 32003},
            "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}},
            "tokenizer_config.json": {
                "added_tokens_decoder": {"32004": {"content": "<tool>x", "special": False}}
            },
        },
    )
    assert tokenizer.vocab_size == 32005
    assert tokenizer.eos_ids == (32001,)
    ids = tokenizer.encode("<tool>x<|im_end|><tool>", add_special_tokens=False)
    assert ids == [32004, 32001, 32003]
    assert tokenizer.decode([*ids, 32002]) == "<tool>x<tool>"
    assert tokenizer.encode("<tool>", False, parse_special=False) == [32003]
    assert 32001 not in tokenizer.encode("<|im_end|>", False, parse_special=False)


def rank_file(pieces: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(p), i) for i, p in enumerate(pieces))


def filler_ranks(count: int) -> bytes:
    """All bytes, then pieces that nothing merges into: only their number matters."""
    pieces = [bytes([b]) for b in range(256)]
    return rank_file(pieces + [b"\xff\xff%06d" % n for n in range(count - 256)])


@needs_assets
def test_tiktoken_ranks_give_the_ids_of_the_same_vocabulary(tmp_path):
    gpt2 = asset_tokenizer("gpt2")
    tokenizer = load(tmp_path, {"gpt2.tiktoken": rank_file(list(gpt2.pieces[:50256]))})
    assert tokenizer.pieces == gpt2.pieces
    assert tokenizer.eos_ids == (50256,)
    for case in golden("gpt2"):
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    text = "a<|endoftext|>"
    for parse in (True, False):
        assert tokenizer.encode(text, parse_special=parse) == gpt2.encode(text, parse_special=parse)


def test_ranks_of_llama3_are_known_by_their_number(tmp_path):
    tokenizer = load(tmp_path, {"tokenizer.model": filler_ranks(128_000)})
    assert tokenizer.vocab_size == 128_256
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (128_000, (128_001, 128_009))
    text = "<|start_header_id|><|end_header_id|><|python_tag|><|reserved_special_token_247|>"
    assert tokenizer.encode(text) == [128_000, 128_006, 128_007, 128_010, 128_255]
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=False) == [128_009]


def test_ranks_of_qwen_are_known_by_their_number(tmp_path):
    tokenizer = load(tmp_path, {"qwen.tiktoken": filler_ranks(151_643)})
    assert tokenizer.encode("<|im_start|>1<|im_end|>") == [151_644, ord("1"), 151_645]
    assert tokenizer.bos_id is None
    assert tokenizer.vocab_size == 151_851


def test_settings_give_other_ranks_their_pattern_and_tokens(tmp_path):
    config = {
        "pat_str": r"\w|\W",
        "bos_token": "<b>",
        "eos_token": "<e>",
        "add_bos_token": True,
        "added_tokens_decoder": {
            "300": {"content": "<b>", "special": True},
            "301": {"content": "<e>", "special": True},
            "303": {"content": "<t>", "special": False},
        },
    }
    tokenizer = load(tmp_path, {"x.tiktoken": filler_ranks(300), "tokenizer_config.json": config})
    assert tokenizer.encode("<t>a<e>") == [300, 303, ord("a"), 301]
    assert tokenizer.encode("<t>", False, parse_special=False) == [303]
    assert tokenizer.decode([300, 303, 302, 301]) == "<t>"


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


@needs_assets
def test_tokenizer_json_is_preferred(tmp_path):
    files: dict[str, Any] = {"tokenizer.model": asset("llama2"), "tokenizer.json": asset("gpt2")}
    assert load(tmp_path, files).vocab_size == 50257


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b"version https://git-lfs.example/spec/v1\n", "is not a tokenizer"),
        ("tokenizer.json", b'{"model": 1}', "is not a tokenizer"),
        ("tokenizer.model", b"", "neither a sentencepiece model nor tiktoken ranks"),
        ("tokenizer.model", b"\x0a\xff\xff", "neither a sentencepiece model nor tiktoken ranks"),
        ("x.tiktoken", b"IQ== 0\n!\n", "line 2 of .* is not a token"),
        ("x.tiktoken", b"IQ== 0\nI*Q= 1\n", "line 2 of .* is not a token"),
        ("x.tiktoken", b"IQ== 0\nIg== 2\n", "do not count up from 0"),
        ("x.tiktoken", b"IQ== 0\n", "no token for byte 0x00"),
        ("x.tiktoken", filler_ranks(300), 'has 300 ranks, .* give .*"pat_str"'),
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("tokenizer_config.json", b"[]", "holds a list"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": "a"}}', "does not map ids"),
        ("added_tokens.json", b"\xff", "is not JSON"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(filler_ranks(300))
    (tmp_path / "tokenizer_config.json").write_text('{"pat_str": "(("}')
    with pytest.raises(ValueError, match=r"x\.tiktoken with '\(\('"):
        load_tokenizer(tmp_path)


@needs_assets
@pytest.mark.parametrize("token_id", [-1, 32_000])
def test_an_id_outside_the_vocabulary_is_named(token_id):
    with pytest.raises(ValueError, match=f"token id {token_id} .* vocabulary size 32000"):
        asset_tokenizer("llama2").decode([1, token_id])


@needs_assets
@pytest.mark.parametrize("name", FILES)
def test_half_a_surrogate_pair_is_refused(name):
    with pytest.raises(ValueError, match=r"character 1 .* half of a surrogate"):
        asset_tokenizer(name).encode("a\ud83d")


def word_tokenizer(decoder: Any, words: list[str]) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    reference.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder:
        reference.decoder = decoder
    return reference


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.WordPiece(cleanup=False),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ],
)
@RELAXED
@given(ids=st.lists(st.integers(0, 6)))
def test_decoders_of_tokenizer_json_are_followed(decoder, ids):
    words = ["[UNK]", "un", "##able", ".", "▁the", "to▁", "!"]
    ids = [4, *ids]  # WordPiece, in the library, spares the first token its rules
    reference = word_tokenizer(decoder, words)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = load(Path(directory), {"tokenizer.json": reference.to_str().encode()})
    assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Strip(" ", 1, 0),  # of every token, without Fuse
        decoders.Replace(tokenizers.Regex("a+"), "b"),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(tmp_path, decoder):
    reference = word_tokenizer(decoder, ["[UNK]"])
    with pytest.raises(ValueError, match=r"tokenizer\.json decodes with .*cannot stream"):
        load(tmp_path, {"tokenizer.json": reference.to_str().encode()})


def test_prompts_are_neither_cut_nor_padded(tmp_path):
    reference = word_tokenizer(None, ["[UNK]", "a"])
    reference.enable_truncation(2)
    reference.enable_padding(length=8)
    tokenizer = load(tmp_path, {"tokenizer.json": reference.to_str().encode()})
    assert tokenizer.encode("a a a") == [1, 1, 1]


@needs_assets
def test_threads_share_a_tokenizer():
    tokenizers_ = [asset_tokenizer("gpt2"), asset_tokenizer("llama2"), stories("tokenizer.json")]
    texts = [case["text"] for case in golden("gpt2")]

    def work(n: int) -> list[str]:
        tokenizer = tokenizers_[n % 3]
        return [tokenizer.decode(tokenizer.encode(text, parse_special=False)) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(24)))
    assert results == [work(n) for n in range(3)] * 8
