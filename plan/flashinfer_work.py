"""How FlashAttention 3's work is shared out among a GPU's multiprocessors, as FlashInfer does it.

It does not know how the kernel is called.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TILE = 128
"""Queries of a head that it computes at a time, where a head has 128 channels."""


@dataclass(frozen=True)
class Prompt:
    num_queries: int
    """Its last tokens."""
    num_keys: int
    """All its tokens."""
    first_query: int
    first_page: int
    """Where its queries and its page table begin, in arrays that hold all prompts'."""


def share_work(
    prompts: Sequence[Prompt], num_heads: int, num_shares: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles, a column each, in the order of their shares; and where each share begins and ends.

    A column is the tile's place in its prompt, its head, the prompt's first query, first page,
    numbers of queries and keys, and the prompt's place.
    """
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(num_shares)]
    # What has most keys is given away first, each time to the share that has least to do.
    heap = [(0, share) for share in range(num_shares)]
    longest_first = sorted(enumerate(prompts), key=lambda pair: -pair[1].num_keys)
    for head in range(num_heads):
        for place, prompt in longest_first:
            cached = prompt.num_keys - prompt.num_queries
            for tile in reversed(range(-(-prompt.num_queries // TILE))):
                cost, share = heapq.heappop(heap)
                num_seen = min(prompt.num_keys, cached + (tile + 1) * TILE)
                heapq.heappush(heap, (cost + 2 * TILE + num_seen, share))
                begins = prompt.first_query, prompt.first_page
                counts = prompt.num_queries, prompt.num_keys
                shares[share].append((tile, head, *begins, *counts, place))
    tiles = [tile for share in shares for tile in share]
    starts = np.cumsum([0, *map(len, shares)])
    return np.array(tiles, np.int32).T, starts.astype(np.int32)
