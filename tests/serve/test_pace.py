"""Prompt beside decode, on a device whose steps take what a formula says."""

import math
import random
from statistics import median

import pytest

from model.config import Experts, Layer, ModelConfig, Rope
from serve.pace import NUM_KEPT, NUM_UNTIL_PROBE, Pace, TokenCost, token_cost

DECODE_S, UNIT_S = 0.010, 0.0005


def run(pace: Pace, num_steps: int, decode_s=DECODE_S, unit_s=UNIT_S, extra_s=0.0, noise=0.0):
    """Costs of steps beside four rows, and the times they took; results come a step late."""
    rng, costs, times, late = random.Random(0), [], [], None
    for _ in range(num_steps):
        cost = pace.allowed(4, least=1.0)
        seconds = decode_s + bool(cost) * extra_s + unit_s * cost
        seconds *= 1 + noise * (rng.random() < 0.1)
        if late is not None:
            pace.observe(4, 1, *late)
        late = cost, seconds
        costs.append(cost)
        times.append(seconds)
    return costs, times


def test_without_decode_or_a_bound_all_is_allowed():
    assert Pace(3.0).allowed(0, least=1.0) == math.inf
    assert Pace(math.inf).allowed(4, least=1.0) == math.inf


def test_steps_come_to_take_as_long_as_they_may_and_never_longer():
    _, times = run(Pace(3.0), 200)
    assert max(times) <= 3.01 * DECODE_S
    assert median(times[20:]) == pytest.approx(3 * DECODE_S, rel=0.01)


def test_a_disturbed_step_now_and_then_does_not_slow_prompts():
    costs, times = run(Pace(3.0), 400, noise=4.0)
    assert median(costs[20:]) == pytest.approx(2 * DECODE_S / UNIT_S, rel=0.05)
    assert sum(taken > 3.1 * DECODE_S for taken in times) < 0.15 * len(times)


def test_it_follows_a_device_that_becomes_slower_or_faster():
    pace = Pace(3.0)
    run(pace, 100)
    costs, _ = run(pace, 40, unit_s=4 * UNIT_S)
    assert costs[-1] == pytest.approx(2 * DECODE_S / (4 * UNIT_S), rel=0.01)
    costs, _ = run(pace, 40)
    assert costs[-1] == pytest.approx(2 * DECODE_S / UNIT_S, rel=0.01)


def test_decode_alone_is_timed_again_now_and_then():
    pace = Pace(3.0)
    costs, _ = run(pace, 1000)
    assert costs.count(0.0) == pytest.approx(1000 / NUM_UNTIL_PROBE, abs=2)
    costs, _ = run(pace, (NUM_KEPT + 2) * NUM_UNTIL_PROBE, decode_s=3 * DECODE_S)
    assert costs[-1] == pytest.approx(2 * 3 * DECODE_S / UNIT_S, rel=0.01)


def test_a_bound_that_cannot_be_kept_leaves_the_least():
    costs, _ = run(Pace(3.0), 100, extra_s=5 * DECODE_S)
    assert costs[-2] == 1.0


def test_batches_of_another_size_are_timed_themselves():
    pace = Pace(3.0)
    run(pace, 50)
    assert pace.allowed(60, least=1.0) == 0.0
    assert pace.allowed(60, least=1.0) == 1.0, "until that step is done"
    pace.observe(60, 1, 0.0, 0.1)
    assert pace.allowed(60, least=1.0) > 1.0
    assert pace.allowed(5, least=1.0) > 1.0, "five rows are as four"


def test_a_loop_of_several_tokens_times_each():
    pace = Pace(3.0)
    pace.observe(4, 8, 0.0, 8 * DECODE_S)
    costs, _ = run(pace, 60)
    assert 0.0 not in costs[:NUM_UNTIL_PROBE]
    assert costs[-1] == pytest.approx(2 * DECODE_S / UNIT_S, rel=0.01)


def test_times_of_zero_divide_nothing():
    costs, _ = run(Pace(3.0), 20, decode_s=0.0, unit_s=0.0)
    assert costs[-1] == 1.0


def config(**changes) -> ModelConfig:
    values = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "mlp_size": 128,
        "layers": (Layer(Rope(1e4)), Layer(Rope(1e4))),
        "max_context": 1024,
        "norm_eps": 1e-5,
        "dtype": "float32",
        "attention_scale": 0.25,
    }
    return ModelConfig(**(values | changes))


WEIGHTS = 64 * (4 + 2 + 2) * 16 + 64 * 64 + 3 * 64 * 128
"""Of a layer that multiply."""
SEEN = 2 * 4 * 16
"""Multiplications of a layer for each token that a token sees."""


def test_attention_costs_by_what_is_seen():
    cost = token_cost(config())
    assert cost.at(0) == 1
    assert cost.at(1000) == pytest.approx(1 + 1000 * SEEN / WEIGHTS)


def test_a_window_bounds_what_its_layers_see():
    layers = (Layer(Rope(1e4)), Layer(Rope(1e4), window=100))
    cost = token_cost(config(layers=layers))
    assert cost.at(1000) == pytest.approx(1 + (1000 + 100) / 2 * SEEN / WEIGHTS)


@pytest.mark.parametrize("num_tokens", [0, 1, 99, 100, 101, 350])
def test_the_first_tokens_cost_what_each_of_them_does(num_tokens):
    cost = TokenCost(((math.inf, 0.25), (100, 0.5)))
    each = sum(cost.at(position) for position in range(num_tokens))
    assert cost.of_first(num_tokens) == pytest.approx(each)


def test_what_a_unit_takes_is_learned_from_prompts_alone_or_else_from_those_beside_decode():
    pace = Pace(2.0)
    assert pace.unit_s == 0
    for _ in range(5):
        pace.observe(4, 1, 0, DECODE_S)
        pace.observe(4, 1, 10, DECODE_S + 10 * UNIT_S)
    assert pace.unit_s == pytest.approx(UNIT_S)
    for _ in range(3):
        pace.observe(0, 0, 10, 20 * UNIT_S)
    assert pace.unit_s == pytest.approx(2 * UNIT_S)


def test_of_experts_those_count_that_a_token_takes():
    layers = (Layer(Rope(1e4), experts=True),)
    some = config(layers=layers, experts=Experts(8, 2, 128, True))
    weights = 64 * (4 + 2 + 2) * 16 + 64 * 64 + 2 * 3 * 64 * 128
    assert token_cost(some).at(1000) == pytest.approx(1 + 1000 * SEEN / weights, rel=0.01)


def test_without_a_model_context_costs_nothing():
    assert TokenCost().at(10**6) == 1
