import re
import urllib.error
import urllib.request
from collections import Counter
from http.client import HTTPResponse

import pytest

from cache.tiers.counts import Decisions, Miss, TierCounts, TierReport
from cache.transfers.counts import Outcome, TransferCounts
from serve.api import http_server
from serve.api.http_server import HttpServer
from tests.serve.fake_engine import FakeEngine


def get(port: int, path: str) -> tuple[int, str]:
    try:
        response: HTTPResponse = urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5)
        with response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_are_named_like_vllms_and_carry_the_model() -> None:
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        status, text = get(server.port, "/metrics")
    assert status == 200
    assert 'weft:num_requests_running{model_name="fake"} 0.0' in text
    assert 'weft:generation_tokens_total{model_name="fake"} 0.0' in text
    assert "# TYPE weft:kv_cache_usage_perc gauge" in text


def test_histograms_are_cumulative_and_carry_their_labels() -> None:
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        for seconds in (0.25, 1.0, 7.0):
            engine.waits.observe(seconds)
        _, text = get(server.port, "/metrics")
    labels = 'model_name="fake",phase="device"'
    lines = [line for line in text.splitlines() if line.startswith("weft:step_phase_seconds")]
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    buckets = {
        bound: value for name, value in found.items() for bound in re.findall(r'le="([^"]*)"', name)
    }
    assert buckets == {"0.5": 1, "1.0": 2, "+Inf": 3}
    assert found[f"weft:step_phase_seconds_count{{{labels}}}"] == 3
    assert found[f"weft:step_phase_seconds_sum{{{labels}}}"] == 8.25


def test_tiers_of_replicas_are_added_up() -> None:
    counts = TierCounts(hits=3, misses=Counter({Miss.CORRUPT: 2}))
    report = TierReport("disk", 5, 0, 100, 1000, 0, False, counts, Decisions(recomputed=4))
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        engine.reports = [report, report]
        _, text = get(server.port, "/metrics")
    assert 'weft:kv_tier_used_bytes{model_name="fake",tier="disk"} 1000.0' in text
    assert 'weft:kv_tier_hits_total{model_name="fake",tier="disk"} 6.0' in text
    labels = 'model_name="fake",reason="corrupt",tier="disk"'
    assert f"weft:kv_tier_misses_total{{{labels}}} 4.0" in text
    labels = 'decision="recomputed",model_name="fake",tier="disk"'
    assert f"weft:kv_tier_decisions_total{{{labels}}} 8.0" in text


def test_transfers_of_replicas_are_added_up() -> None:
    counts = TransferCounts(Counter({Outcome.COMPLETE: 2, Outcome.LATE: 1}), pages=7, bytes=700)
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        assert "weft:kv_transfer" not in get(server.port, "/metrics")[1]
        engine.transferred = [counts, counts]
        _, text = get(server.port, "/metrics")
    assert 'weft:kv_transfers_total{model_name="fake",outcome="complete"} 4.0' in text
    assert 'weft:kv_transfers_total{model_name="fake",outcome="late"} 2.0' in text
    assert 'weft:kv_transfers_total{model_name="fake",outcome="broken"} 0.0' in text
    assert 'weft:kv_transfer_pages_total{model_name="fake"} 14.0' in text


def test_shapes_that_a_kernel_left_to_the_reference_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(http_server, "fallbacks", {("decode_attention", "pallas", "wide"): 3})
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        _, text = get(server.port, "/metrics")
    labels = 'kernel="pallas",operation="decode_attention",reason="wide"'
    assert f"weft:kernel_fallbacks_total{{{labels}}} 3.0" in text


def test_health_ends_with_a_drain_or_a_failure() -> None:
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        assert get(server.port, "/health") == (200, "ok")
        engine.drain()
        assert get(server.port, "/health")[0] == 503
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        engine.fail(RuntimeError("broken"))
        assert get(server.port, "/health")[0] == 503


def test_another_path_is_told_which_there_are() -> None:
    with FakeEngine() as engine, HttpServer(engine, "127.0.0.1:0") as server:
        assert get(server.port, "/") == (404, "there are /metrics and /health")


def test_a_taken_port_is_refused_by_name() -> None:
    with (
        FakeEngine() as engine,
        HttpServer(engine, "127.0.0.1:0") as server,
        pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"),
    ):
        HttpServer(engine, f"127.0.0.1:{server.port}")
