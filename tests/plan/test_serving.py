"""The engine under a load: what a server would compile, and rates that add up."""

import re
from dataclasses import replace
from typing import Any

import pytest

from plan import serving as module
from plan.ahead import prepare
from plan.devices import Devices
from plan.kinds.serving import Serving
from plan.models import load_model
from plan.serving import Load, shapes

CPU = Devices("cpu", 1)
TINY = Serving(
    "tiny",
    concurrency=3,
    prompt=20,
    output=9,
    max_batch=2,
    token_budget=34,
    chunk=32,
    max_steps=4,
    max_context=32,
    page_size=16,
)


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as eight, and compiled in less time."""
    monkeypatch.setattr(module, "load_model", lambda name, **rest: load_model(name, 2, **rest))


def test_programs_are_the_servers_but_for_smaller_batches() -> None:
    found = [(s.num_decode, s.num_chunks, s.max_tokens) for s in shapes(replace(TINY, max_batch=3))]
    assert found == [(4, 0, 1), (4, 0, 4), (0, 1, 1), (4, 1, 1)]
    alone = [
        (s.num_decode, s.num_chunks, s.max_tokens) for s in shapes(replace(TINY, concurrency=1))
    ]
    assert alone == [(1, 0, 1), (1, 0, 4), (0, 1, 1)]


def test_a_batch_is_answered_in_full_and_its_rates_add_up(monkeypatch) -> None:
    loads: list[Load] = []
    batch = module._batch

    def watched(load: Load) -> dict[str, Any]:
        loads.append(load)
        return batch(load)

    monkeypatch.setattr(module, "_batch", watched)
    prepare([TINY], CPU, num_threads=2)
    figures = TINY.measure(CPU, None).figures
    assert figures["output_tokens_per_s"] * figures["window_s"] == pytest.approx(3 * 9)
    assert 0 < figures["ttft_median_s"] <= figures["ttft_p99_s"] < figures["window_s"]
    assert figures["between_tokens_median_s"] > 0
    assert figures["decode_tokens_per_s"] > 0
    assert figures["step_kind"] in ("decode", "loop", "mixed", "prefill")
    assert 0 <= figures["host_gap_least_s"] <= figures["host_gap_s"] <= figures["host_gap_p90_s"]
    assert figures["turn_s"] > figures["dispatch_s"] > 0
    (load,) = loads
    assert load.num_ended == load.num_submitted == 6, "once to warm up, once timed"


def test_a_closed_loop_stays_full() -> None:
    figures = replace(TINY, window_s=0.3).measure(CPU, None).figures
    assert figures["window_s"] == pytest.approx(0.3, abs=0.2)
    assert figures["step_rows"] > 1.3
    assert figures["num_finished"] > 3
    finished = figures["num_finished"] * TINY.output
    assert figures["output_tokens_per_s"] * figures["window_s"] == pytest.approx(finished, rel=0.3)


def test_a_request_that_does_not_end_by_its_length_fails_the_point(monkeypatch) -> None:
    submit = Load.submit

    def submit_and_abort(self: Load, prompt: int, output: int) -> None:
        submit(self, prompt, output)
        self.engine.abort(f"request-{self.num_submitted}")

    monkeypatch.setattr(Load, "submit", submit_and_abort)
    with pytest.raises(RuntimeError, match=r"request-1 ended by .*CANCELLED"):
        TINY.measure(CPU, None)


def test_memory_without_room_for_a_request_is_a_misfit(monkeypatch) -> None:
    monkeypatch.setattr(module, "find_memory_bytes", lambda devices, hardware: 10)
    assert "holds no request" in TINY.measure(CPU, None).misfit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"concurrency": 0}, "concurrency is 0; it must be 1 or more"),
        ({"window_s": -1.0}, "window_s is -1.0; it must be seconds, or 0 for a batch"),
        ({"token_budget": 2}, "raise token_budget above max_batch"),
        ({"output": 13}, "prompt and output are 33 tokens; tiny and max_context allow 32"),
        ({"kernels": "fast"}, "kernels is 'fast'"),
        ({"model": "tinny"}, "there is no model tinny"),
    ],
)
def test_senseless_settings_are_refused(changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(TINY, **changes)


def test_devices_that_are_not_there_serve_nobody() -> None:
    described = Devices("h200", 1)
    with pytest.raises(ValueError, match="h200:1 is described"):
        TINY.measure(described, None)
    assert not TINY.jobs(described)
