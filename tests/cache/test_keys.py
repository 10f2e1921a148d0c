"""Names of pages: they must not change unseen, since they outlive a process, and must not meet."""

import random
from hashlib import blake2b
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.keys import KEY_BYTES, PageNames, block_of, page_key, root_key

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


ROOT = root_key()


def names_of(tokens, page_size=4, root=ROOT) -> PageNames:
    names = PageNames(root, page_size)
    names.extend(tokens)
    return names


def test_chain_is_the_one_that_disks_hold():
    names = names_of([0, 1, 2, 3, 255, 256, 65_536, 2**31 - 1, 7], root=root_key("acme", "salt"))
    assert names.root.hex() == "d297cb196d44725aa9a4a35b1913c268"
    assert [key.hex() for key in names.keys] == [
        "918d4f92eeff0d315e9e32e2d301c2ee",
        "045b81e4ac66210c53293c0404bf9d1c",
    ]
    assert root_key().hex() == "36020fc04aebeef45dfe5e10d31afccf"


@given(TOKENS, st.integers(1, 9))
def test_page_is_named_by_its_parent_and_its_tokens_in_little_endian(tokens, page_size):
    names = names_of(tokens, page_size)
    parent = root_key()
    for number in range(len(tokens) // page_size):
        block = b"".join(
            token.to_bytes(4, "little")
            for token in tokens[number * page_size : (number + 1) * page_size]
        )
        assert names.blocks[number] == block
        assert names.parent(number) == parent
        parent = blake2b(parent + block, digest_size=KEY_BYTES).digest()
        assert names.keys[number] == parent == page_key(names.parent(number), block)
    assert len(names) == len(tokens) // page_size


@given(TOKENS, st.integers(1, 9), st.lists(st.integers(0, 40)))
def test_sequence_that_grows_has_the_names_of_the_whole(tokens, page_size, lengths):
    growing = PageNames(root_key(), page_size)
    for length in [*sorted(lengths), len(tokens)]:
        growing.extend(tokens[:length])
    assert growing.keys == names_of(tokens, page_size).keys


def test_equal_pages_after_different_ones_have_different_names():
    one, other = names_of([1, 2, 5, 6], 2), names_of([3, 4, 5, 6], 2)
    assert one.blocks[1] == other.blocks[1]
    assert one.keys[1] != other.keys[1]


def test_tenants_and_salts_that_read_alike_together_have_different_roots():
    pairs = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab"), ("1:a", "")]
    pairs += [("", "1:a"), ("é", ""), ("", "\ud800")]
    assert len({root_key(*pair) for pair in pairs}) == len(pairs)


def test_root_is_not_the_name_of_a_page():
    assert root_key("a") != page_key(b"", b"1:a")


def test_prompt_of_128k_tokens_has_2048_different_names():
    rng = random.Random(0)
    names = names_of(rng.choices(range(128_256), k=131_072), 64)
    assert len(set(names.keys)) == len(names) == 2048
    for number, (parent, key) in enumerate(pairwise(names.keys), 1):
        assert page_key(parent, names.blocks[number]) == key


@pytest.mark.parametrize("token", [-1, 2**32])
def test_token_that_is_no_32_bit_number_is_refused(token):
    with pytest.raises(OverflowError):
        block_of([token])
