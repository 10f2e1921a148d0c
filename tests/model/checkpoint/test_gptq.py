"""Rounding for known inputs: what it computes, against a slow form of it, and what it gains."""

import numpy as np
import pytest

from model.checkpoint import CheckpointError, gptq
from model.checkpoint.gptq import Moments, round_for
from model.checkpoint.quantize import LARGEST, nearest, quantize

KINDS = ("int8", "fp8")


def correlated(num_tokens: int, num_inputs: int, seed: int = 0) -> np.ndarray:
    """Inputs that mostly are mixtures of a quarter as many."""
    rng = np.random.default_rng(seed)
    sources = rng.standard_normal((num_tokens, num_inputs // 4))
    mixing = np.random.default_rng(9).standard_normal((num_inputs // 4, num_inputs))
    own = 0.1 * rng.standard_normal((num_tokens, num_inputs))
    return (sources @ mixing + own).astype(np.float32)


def random_weight(num_inputs: int, num_outputs: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((num_inputs, num_outputs), np.float32)


def obvious(weight: np.ndarray, x: np.ndarray, original: np.ndarray, kind: str) -> np.ndarray:
    """Row by row, the rest moved by the inverse of what is left (GPTQ's equations 2 and 3)."""
    metric = x.T.astype(float) @ x
    metric += np.eye(len(metric)) * np.trace(metric) / len(x)
    meant = weight + np.linalg.inv(metric) @ x.T @ (original - x) @ weight
    scales = np.abs(meant).max(0) / LARGEST[kind]
    numbers, moved = np.zeros(weight.shape), meant.astype(float)
    left = list(np.argsort(-np.diagonal(metric)))
    while left:
        row, *rest = left
        numbers[row] = nearest(moved[row] / scales, kind)
        inverse = np.linalg.inv(metric[np.ix_(left, left)])
        error = (moved[row] - numbers[row] * scales) / inverse[0, 0]
        moved[rest] -= np.outer(inverse[1:, 0], error)
        left = rest
    return numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [5, 128])
def test_numbers_are_those_of_the_slow_form(kind, block, monkeypatch):
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, x = random_weight(24, 6), correlated(200, 24)
    original = x + 0.1 * correlated(200, 24, seed=5)
    numbers, _ = round_for(weight, Moments.of([(x, original)]), kind, "w")
    np.testing.assert_array_equal(numbers.astype(float), obvious(weight, x, original, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_other_inputs_alike_are_nearer_than_rounded_to_nearest(kind):
    weight, x, other = random_weight(64, 20), correlated(1000, 64), correlated(500, 64, seed=2)

    def error(numbers: np.ndarray, scales: np.ndarray) -> float:
        return float(np.linalg.norm(other @ (numbers.astype(np.float32) * scales - weight)))

    calibrated = error(*round_for(weight, Moments.of([(x, x)]), kind, "w"))
    assert calibrated < 0.5 * error(*quantize(weight, (0,), kind, "w"))


def test_what_was_rounded_before_is_made_up_for():
    weight, original = random_weight(64, 20), correlated(1000, 64)
    x = 0.9 * original + 0.02 * correlated(1000, 64, seed=3)

    def error(inputs: Moments) -> float:
        numbers, scales = round_for(weight, inputs, "int8", "w")
        return float(np.linalg.norm(x @ (numbers * scales) - original @ weight))

    assert error(Moments.of([(x, original)])) < 0.5 * error(Moments.of([(x, x)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [np.eye(16), np.zeros((0, 16)), np.zeros((5, 16))])
def test_inputs_that_tell_nothing_of_each_other_leave_rounding_to_nearest(kind, x):
    weight, x = random_weight(16, 7), x.astype(np.float32)
    found = round_for(weight, Moments.of([(x, x)]), kind, "w")
    for ours, plain in zip(found, quantize(weight, (0,), kind, "w"), strict=True):
        assert ours.tobytes() == plain.tobytes()


def test_tokens_may_come_some_at_a_time():
    x, original = correlated(90, 8), correlated(90, 8, seed=1)
    whole = Moments.of([(x, original)])
    parts = Moments.of((x[i : i + 40], original[i : i + 40]) for i in range(0, 90, 40))
    assert parts.num_tokens == whole.num_tokens == 90
    np.testing.assert_allclose(parts.here_II, whole.here_II, rtol=1e-4)
    np.testing.assert_allclose(parts.away_II, whole.away_II, rtol=1e-4, atol=1e-2)


def test_inputs_that_are_not_finite_are_refused_by_the_weights_name():
    x = correlated(30, 8)
    x[3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down is multiplied with numbers"):
        round_for(random_weight(8, 2), Moments.of([(x, x)]), "int8", "layers.2.mlp.down")


def test_numbers_beyond_the_largest_become_it():
    for kind in KINDS:
        found = nearest(np.array([1e4, -1e4], np.float32), kind).astype(float)
        assert found.tolist() == [LARGEST[kind], -LARGEST[kind]]
