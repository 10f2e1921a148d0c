"""Inputs of products are noted for whoever asks, while they are asked for."""

import jax.numpy as jnp
import numpy as np

from model.inputs import note_input, noted_inputs
from model.linear import Norm, rms_norm


def test_inputs_are_noted_only_while_somebody_asks():
    x_ND = jnp.ones((2, 3))
    note_input(x_ND)
    with noted_inputs() as inputs:
        note_input(x_ND)
        with noted_inputs() as inner:
            note_input(x_ND, routed_EN=jnp.ones((4, 2)))
        note_input(x_ND)
    note_input(x_ND)
    assert [one.routed_EN is None for one in inputs] == [True, True]
    assert [one.routed_EN is None for one in inner] == [False]


def test_what_is_noted_is_normalized():
    x_ND = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3), np.float32))
    norm = Norm(jnp.array([1.0, 2.0, 3.0]), 1e-5)
    with noted_inputs() as inputs:
        note_input(x_ND, norm)
    np.testing.assert_array_equal(inputs[0].x_ND, rms_norm(x_ND, norm))
