"""FlashAttention 3's tiles are shared out whole, once each, and evenly."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plan.flashinfer_work import TILE, Prompt, share_work

PROMPTS = st.lists(
    st.builds(
        lambda queries, cached, first_query, first_page: Prompt(
            queries, queries + cached, first_query, first_page
        ),
        st.integers(1, 5 * TILE),
        st.integers(0, 1000),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=4,
)


def cost(column: tuple[int, ...]) -> int:
    """Keys are read once for a tile, and its queries twice as costly."""
    tile, _, _, _, num_queries, num_keys, _ = column
    return 2 * TILE + min(num_keys, num_keys - num_queries + (tile + 1) * TILE)


@given(prompts=PROMPTS, num_heads=st.integers(1, 4), num_shares=st.integers(1, 9))
def test_each_tile_of_each_head_is_in_one_share(prompts, num_heads, num_shares) -> None:
    tiles, starts = share_work(prompts, num_heads, num_shares)
    assert tiles.dtype == starts.dtype == np.int32
    expected = [
        (tile, head, one.first_query, one.first_page, one.num_queries, one.num_keys, place)
        for head in range(num_heads)
        for place, one in enumerate(prompts)
        for tile in range(-(-one.num_queries // TILE))
    ]
    assert sorted(map(tuple, tiles.T.tolist())) == sorted(expected)
    assert len(starts) == num_shares + 1
    assert starts[0] == 0
    assert starts[-1] == len(expected)
    assert (np.diff(starts) >= 0).all()


@given(prompts=PROMPTS, num_heads=st.integers(1, 4), num_shares=st.integers(1, 9))
def test_no_share_has_a_tile_more_to_do_than_another(prompts, num_heads, num_shares) -> None:
    tiles, starts = share_work(prompts, num_heads, num_shares)
    costs = [cost(tuple(column)) for column in tiles.T.tolist()]
    shares = [sum(costs[begin:end]) for begin, end in pairwise(starts.tolist())]
    assert max(shares) - min(shares) <= max(costs)
