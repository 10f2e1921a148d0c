import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.detokenizer import Detokenizer, StopStrings
from model.tokenizer import Tokenizer
from tests.assets import needs_assets
from tests.model.test_tokenizer import FILES, asset_tokenizer, stories

# No deadline: a machine may be busy.
RELAXED = settings(deadline=None, max_examples=40)
NAMES = [*FILES, "stories.json", "stories.model"]
TEXTS = st.text(max_size=40) | st.text("ab \n▁é東😀🇫🇷\u0301\u200d\ufffd", max_size=20)


def tokenizer_named(name: str) -> Tokenizer:
    if name.startswith("stories"):
        return stories(name.replace("stories", "tokenizer"))
    return asset_tokenizer(name)


def split(items, cuts):
    """`items` in consecutive parts, cut at `cuts` modulo the length."""
    ends = sorted(cut % (len(items) + 1) for cut in cuts)
    starts = [0, *ends]
    return [items[a:b] for a, b in zip(starts, [*ends, len(items)], strict=True)]


@st.composite
def token_lists(draw, tokenizer):
    """Ids of texts, single bytes and any ids at all, special ones and broken UTF-8 among them."""
    byte_ids = [i for i, piece in enumerate(tokenizer.pieces) if len(piece) == 1]
    space_ids = [i for i, piece in enumerate(tokenizer.pieces) if piece and not piece.strip(b" ")]
    part = st.one_of(
        TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False)),
        st.lists(st.sampled_from(byte_ids), max_size=8),
        st.lists(st.sampled_from(space_ids), max_size=4),
        st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8),
        st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=3),
    )
    return [i for ids in draw(st.lists(part, max_size=3)) for i in ids]


CUTS = st.lists(st.integers(0, 1000), max_size=12)


@needs_assets
@pytest.mark.parametrize("name", NAMES)
@RELAXED
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_pieces_join_to_the_text_decoded_at_once(name, data, cuts, skip):
    tokenizer = tokenizer_named(name)
    ids = data.draw(token_lists(tokenizer))
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(part) for part in split(ids, cuts)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip)


@needs_assets
@pytest.mark.parametrize("name", NAMES)
@RELAXED
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_a_completion_has_the_text_it_adds_to_the_prompt(name, data, cuts, skip):
    tokenizer = tokenizer_named(name)
    prompt_ids = data.draw(token_lists(tokenizer))
    ids = data.draw(token_lists(tokenizer))
    stream = Detokenizer(tokenizer, prompt_ids, skip)
    text = "".join(stream.push(part) for part in split(ids, cuts)) + stream.flush()

    # A prompt that ends amid a character leaves that character to the completion.
    alone = Detokenizer(tokenizer, skip_special_tokens=skip)
    complete = alone.push(prompt_ids)
    assert complete + text == tokenizer.decode(prompt_ids + ids, skip)
    if not alone.flush():
        whole = tokenizer.decode(prompt_ids, skip)
        assert text == tokenizer.decode(prompt_ids + ids, skip)[len(whole) :]


@needs_assets
@pytest.mark.parametrize("name", NAMES)
@RELAXED
@given(text=TEXTS)
def test_no_piece_has_half_a_character(name, text):
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode(text.replace("\ufffd", ""), parse_special=False)
    stream = Detokenizer(tokenizer)
    assert not any("\ufffd" in stream.push([i]) for i in ids)
    assert stream.flush() == ""


@needs_assets
@pytest.mark.parametrize("name", NAMES)
def test_invalid_bytes_are_not_held_back(name):
    tokenizer = tokenizer_named(name)
    continuation = tokenizer.pieces.index(b"\x80")
    first_of_four = tokenizer.pieces.index(b"\xf0")
    stream = Detokenizer(tokenizer)
    assert [stream.push([continuation]) for _ in range(4)] == ["\ufffd"] * 4
    assert [stream.push([first_of_four]) for _ in range(3)] == ["", "\ufffd", "\ufffd"]
    assert stream.flush() == "\ufffd"


@needs_assets
def test_a_character_begun_by_the_prompt_is_the_completions():
    llama2 = asset_tokenizer("llama2")
    face = [llama2.pieces.index(bytes([b])) for b in "😀".encode()]
    stream = Detokenizer(llama2, [1, *face[:3]])
    assert stream.push(face[3:]) == "😀"


@needs_assets
def test_a_leading_space_is_dropped_only_where_no_text_precedes():
    llama2 = asset_tokenizer("llama2")
    hello = llama2.encode("Hello", add_special_tokens=False)
    lone_space = [llama2.pieces.index(b" ")]
    assert Detokenizer(llama2).push(hello) == "Hello"
    assert Detokenizer(llama2, [1]).push(hello) == "Hello"
    assert Detokenizer(llama2, [1], skip_special_tokens=False).push(hello) == " Hello"
    assert Detokenizer(llama2, [1, *hello]).push(hello) == " Hello"
    assert Detokenizer(llama2, [1, *lone_space]).push(hello) == " Hello"


@needs_assets
def test_all_leading_spaces_are_dropped_where_encoding_collapses_them():
    tinystories = asset_tokenizer("tinystories")
    space, the = (tinystories.pieces.index(piece) for piece in (b" ", b" the"))
    stream = Detokenizer(tinystories)
    assert [stream.push([i]) for i in (space, space, the, the)] == ["", "", "the", " the"]
    assert Detokenizer(tinystories, [the, space, space, space]).push([the]) == " the"


@needs_assets
def test_ids_of_a_padded_vocabulary_have_no_text():
    llama2 = asset_tokenizer("llama2")
    stream = Detokenizer(llama2, [40_000])
    assert stream.push([-1, 7251, 32_000, 40_000]) + stream.flush() == "hi"


class CountedTuple(tuple):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@needs_assets
def test_each_id_is_looked_up_once_however_long_the_output():
    llama2 = asset_tokenizer("llama2")
    counted = CountedTuple(llama2.pieces)
    stream = Detokenizer(replace(llama2, pieces=counted))
    ids = random.Random(1).choices(range(3, 32_000), k=2000)
    assert "".join(stream.push([i]) for i in ids) + stream.flush() == llama2.decode(ids)
    assert counted.reads == len(ids)


@needs_assets
def test_of_a_long_prompt_only_the_end_is_looked_up():
    llama2 = asset_tokenizer("llama2")
    counted = CountedTuple(llama2.pieces)
    Detokenizer(replace(llama2, pieces=counted), [278] * 100_000)
    assert counted.reads < 8


def cut(text: str, stops: list[str]) -> str:
    """The obvious search of the whole text."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@settings(RELAXED, max_examples=200)
@given(
    text=st.text("ab", max_size=30) | st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), max_size=4),
    cuts=CUTS,
)
@example(text="abcd", stops=["bc", "abcd"], cuts=[3])
@example(text="abcx", stops=["bc", "abcd"], cuts=[3])
@example(text="abc", stops=["bc", "abcd"], cuts=[3])
@example(text="xxabcx", stops=["bc", "abcd"], cuts=[5])
@example(text="aab", stops=["ab"], cuts=[2])
def test_text_ends_where_the_earliest_stop_string_begins(text, stops, cuts):
    search = StopStrings(stops)
    released = ""
    for part in split(text, cuts):
        released += search.push(part)
        assert cut(text, stops).startswith(released)
    released += search.flush()
    assert released == cut(text, stops)
    assert (search.stop is None) == (not any(stop in text for stop in stops))
    if search.stop is not None:
        assert text[len(released) :].startswith(search.stop)


@RELAXED
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1), max_size=3))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text, stops):
    search = StopStrings(stops)
    released = ""
    for n, character in enumerate(text, start=1):
        released += search.push(character)
        if search.stop is not None:
            break
        held = text[len(released) : n]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_follows_a_stop_string():
    search = StopStrings(["</s>"])
    assert search.push("a</") == "a"
    assert search.push("s>b") == ""
    assert search.stop == "</s>"
    assert search.push("c") == ""
    assert search.flush() == ""


def test_without_stop_strings_text_passes():
    search = StopStrings([])
    assert search.push("abc") == "abc"
    assert search.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["a", ""])


class CountedStr(str):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_a_character_costs_a_few_steps_however_long_the_stop_string():
    stop = CountedStr("a" * 5000 + "b")
    search = StopStrings([stop])
    stop.reads = 0
    assert "".join(search.push("a") for _ in range(20_000)) == "a" * 15_000
    # Two steps per character on average, one to fall back and one to match, each of two reads.
    assert stop.reads <= 4 * 20_000
