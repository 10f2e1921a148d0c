"""Tokens grouped by the experts they were routed to, in tiles of rows that belong to one expert.

Nothing is sorted: a row's place is counted. It does not know what is computed with a tile.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Tiles:
    """I tiles of X rows; expert e has those from first_E[e] to before end_E[e]."""

    token_IX: Int[Array, "I X"]
    """Whose row it is; N where it is nobody's."""
    row_NA: Int[Array, "N A"]
    """A token's rows among all I x X, in the order of their experts; I x X where it has fewer."""
    share_NA: Float[Array, "N A"]
    """What each of them counts in the token's sum."""
    first_E: Int[Array, " E"]
    end_E: Int[Array, " E"]


def deal(routed_EN: Float[Array, "E N"], top_k: int, tile: int) -> Tiles:
    """Tiles of `tile` rows for all weights that aren't zero, `top_k` of a token at most."""
    (E, N), A = routed_EN.shape, min(top_k, len(routed_EN))
    num_tiles = most_tiles(E, N * A, tile)
    chosen_EN = routed_EN != 0
    tiles_E = -(-chosen_EN.sum(axis=1, dtype=jnp.int32) // tile)
    end_E = jnp.cumsum(tiles_E)
    first_E = end_E - tiles_E

    token_EN = lax.broadcasted_iota(jnp.int32, (E, N), 1)
    place_EN = jnp.cumsum(chosen_EN, axis=1, dtype=jnp.int32) - 1
    row_EN = jnp.where(chosen_EN, first_E[:, None] * tile + place_EN, num_tiles * tile)
    token_M = jnp.full(num_tiles * tile, N, jnp.int32).at[row_EN].set(token_EN, mode="drop")

    choice_EN = jnp.cumsum(chosen_EN, axis=0, dtype=jnp.int32) - 1
    choice_EN = jnp.where(chosen_EN, token_EN * A + choice_EN, N * A)
    place_EN = lax.iota(jnp.int32, E * N).reshape(E, N)
    place_NA = jnp.full(N * A, E * N, jnp.int32).at[choice_EN].set(place_EN, mode="drop")
    row_NA, share_NA = (
        array_EN.reshape(-1).at[place_NA].get(mode="fill", fill_value=fill).reshape(N, A)
        for array_EN, fill in ((row_EN, num_tiles * tile), (routed_EN, 0))
    )
    return Tiles(token_M.reshape(num_tiles, tile), row_NA, share_NA, first_E, end_E)


def most_tiles(num_experts: int, num_rows: int, tile: int) -> int:
    """How many are needed when every expert that has rows has one in its last tile."""
    with_rows = min(num_experts, num_rows)
    return with_rows + (num_rows - with_rows) // tile


def combine(out_MD: Float[Array, "M D"], tiles: Tiles) -> Float[Array, "N D"]:
    """Each token's sum of its rows, each by its share; float32."""
    out_NAD = out_MD.at[tiles.row_NA].get(mode="fill", fill_value=0).astype(jnp.float32)
    return (out_NAD * tiles.share_NA[..., None]).sum(axis=1)
