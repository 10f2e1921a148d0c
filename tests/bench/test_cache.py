"""`bench/cache.py` on a model small enough for a test."""

import json

import pytest

from bench.cache import Load, run
from bench.random_model import random_model
from serve.errors import RequestError

TINY = {"hidden": 32, "mlp": 64, "layers": 1, "heads": 2, "kv-heads": 1, "vocab": 64}
LOAD = Load(num_turns=3, num_cached=100, num_new=20, num_answered=8, runs=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(TINY, tmp_path_factory.mktemp("models"), lambda line: None)


def test_a_turn_computes_what_is_new(model, tmp_path):
    few = ["schedule.max_steps=1", "schedule.max_batch=1", "schedule.token_budget=64"]
    report = run(model, few, LOAD, cache=tmp_path)
    assert [turn.num_prompt for turn in report.turns] == [20, 48, 76]
    # The last token of an answer has been chosen, not computed.
    assert [turn.num_new for turn in report.turns] == [20, 21, 21]
    assert [turn.num_computed for turn in report.turns] == [20, 21, 21]
    assert [prefix.where for prefix in report.prefixes] == ["device", "host", "disk"]
    on_device = report.prefixes[0]
    assert on_device.num_found == 100
    shares = json.loads(report.to_json())["shares"]
    assert shares["device"] == on_device.first_token_s / on_device.uncached_s
    assert not list(tmp_path.iterdir()), "the disk's pages are deleted"
    assert "| 3 | 76 | 21 | 21 |" in report.to_markdown()
    assert f"`weft bench cache {model} --turns 3 --cached 100" in report.to_markdown()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.max_context=100"], r"up to 128 tokens .* context of 100; lower --cached"),
        (["cache.pages=7"], r"a request of 128 tokens doesn't fit the cache, which holds 112"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(model, overrides, message):
    with pytest.raises(RequestError, match=message):
        run(model, overrides, LOAD)
