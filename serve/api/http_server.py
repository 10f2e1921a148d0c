"""The HTTP endpoint: `/metrics` for Prometheus, named as vLLM names them, and `/health`.

It does not know requests: what it tells is what the engine says when it is asked.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, groupby
from typing import Protocol, Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

from cache.contexts.registry import Contexts
from cache.tiers.counts import TierReport
from cache.transfers.counts import Outcome, TransferCounts
from model.kernel_choice import fallbacks
from serve import front
from serve.pins import RetainedCounts
from serve.telemetry import Histogram, Series

Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


class Engine(front.Engine, Protocol):
    """What is shown of an engine."""

    def series(self) -> Sequence[Series]: ...
    def tiers(self) -> Sequence[TierReport]: ...
    def transfers(self) -> Sequence[TransferCounts]: ...
    def retained(self) -> RetainedCounts: ...


class HttpServer:
    """Answers on `address`, HOST:PORT, while the context lasts; at port 0 the system chooses one.

    Raises OSError when the address cannot be listened on.
    """

    def __init__(self, engine: Engine, address: str, contexts: Contexts | None = None):
        host, _, port = address.rpartition(":")
        try:
            self._server = ThreadingHTTPServer((host, int(port)), _handler(engine, contexts))
        except OSError as error:
            raise OSError(
                f"cannot listen on {address}: {error.strerror}; choose another host:port"
            ) from None
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class EngineCollector:
    """An engine's load and times as metrics, read anew at each scrape, and what is kept there."""

    def __init__(self, engine: Engine, contexts: Contexts | None = None):
        self._engine, self._contexts = engine, contexts

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._histograms()
        yield from self._tiers()
        yield from self._transfers()
        yield self._fallbacks()

    def _load(self) -> Iterator[Metric]:
        load, retained = self._engine.load(), self._engine.retained()
        gauges = {
            "num_requests_running": load.num_running,
            "num_requests_waiting": load.num_waiting,
            "kv_cache_usage_perc": load.pages_used / max(load.pages_total, 1),
            "retained_pages": retained.num_pages,
        }
        if self._contexts is not None:
            gauges["contexts"] = len(self._contexts)
            gauges["contexts_tokens"] = self._contexts.num_tokens
        counters = {
            "prompt_tokens": load.prompt_tokens,
            "generation_tokens": load.generated_tokens,
            "num_preemptions": load.num_preemptions,
            "prefix_cache_queries": load.prefix_queries,
            "prefix_cache_hits": load.prefix_hits,
            "num_requests_finished": load.num_finished,
            "retained_pages_refused": retained.num_refused,
            "compiles_after_warmup": load.compiles_after_warmup,
        }
        labels = {"model_name": self._engine.info.name}
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                metric = family(f"weft:{name}", name.replace("_", " "), labels=list(labels))
                metric.add_metric(list(labels.values()), value)
                yield metric

    def _tiers(self) -> Iterator[Metric]:
        """Of each tier, of all replicas together."""
        totals: dict[tuple[Family, str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
        for report in self._engine.tiers():
            for family, name, label, values in _tier_values(report):
                for which, value in values.items():
                    totals[family, name, label][report.name, which] += value
        model = self._engine.info.name
        for (family, name, label), values in totals.items():
            labels = ["model_name", "tier", *([label] if label else [])]
            metric = family(f"weft:kv_tier_{name}", name.replace("_", " "), labels=labels)
            for (tier, which), value in values.items():
                metric.add_metric([model, tier, *([which] if label else [])], value)
            yield metric

    def _transfers(self) -> Iterator[Metric]:
        """What came of prompts that other engines may compute, of all replicas together."""
        reports = self._engine.transfers()
        if not reports:
            return
        model = self._engine.info.name
        outcomes = CounterMetricFamily(
            "weft:kv_transfers", "prompts by how they came over", labels=["model_name", "outcome"]
        )
        for outcome in Outcome:
            total = sum(report.outcomes[outcome] for report in reports)
            outcomes.add_metric([model, outcome], total)
        yield outcomes
        for what in ("pages", "bytes"):
            metric = CounterMetricFamily(
                f"weft:kv_transfer_{what}", f"{what} received", labels=["model_name"]
            )
            metric.add_metric([model], sum(getattr(report, what) for report in reports))
            yield metric

    def _fallbacks(self) -> Metric:
        labels = ["operation", "kernel", "reason"]
        metric = CounterMetricFamily(
            "weft:kernel_fallbacks", "shapes left to the reference when compiling", labels=labels
        )
        for shape, times in dict(fallbacks).items():
            metric.add_metric(shape, times)
        return metric

    def _histograms(self) -> Iterator[Metric]:
        model = self._engine.info.name
        for name, alike in groupby(self._engine.series(), lambda series: series.name):
            some = list(alike)
            labels = ["model_name", *some[0].labels]
            metric = HistogramMetricFamily(f"weft:{name}", name.replace("_", " "), labels=labels)
            for series in some:
                values = [model, *series.labels.values()]
                metric.add_metric(values, _cumulative(series.histogram), series.histogram.total)
            yield metric


def _tier_values(
    report: TierReport,
) -> list[tuple[Family, str, str, Mapping[str, int]]]:
    """Metric, a label beside the tier's name, and its values by that label."""
    counts, decisions = report.counts, report.decisions
    decided = {
        "fetched": decisions.fetched,
        "recomputed": decisions.recomputed,
        "abandoned": decisions.abandoned,
        "probed": decisions.probed,
    }
    return [
        (GaugeMetricFamily, "used_bytes", "", {"": report.num_pages * report.page_bytes}),
        (GaugeMetricFamily, "budget_bytes", "", {"": report.budget_bytes}),
        (GaugeMetricFamily, "pinned_pages", "", {"": report.num_pinned}),
        (GaugeMetricFamily, "queued_pages", "", {"": report.num_queued}),
        (GaugeMetricFamily, "off", "", {"": int(report.is_off)}),
        (CounterMetricFamily, "hits", "", {"": counts.hits}),
        (CounterMetricFamily, "misses", "reason", {**counts.misses}),
        (CounterMetricFamily, "read_bytes", "", {"": counts.bytes_read}),
        (CounterMetricFamily, "written_bytes", "", {"": counts.bytes_written}),
        (CounterMetricFamily, "evicted", "", {"": counts.evicted}),
        (CounterMetricFamily, "drops", "reason", {**counts.drops}),
        (CounterMetricFamily, "errors", "reason", counts.errors),
        (CounterMetricFamily, "decisions", "decision", decided),
    ]


def _cumulative(histogram: Histogram) -> list[tuple[str, int]]:
    """Prometheus counts in each bucket all that is no larger."""
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def _handler(engine: Engine, contexts: Contexts | None) -> type[BaseHTTPRequestHandler]:
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, contexts))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/metrics":
                    self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
                case "/health":
                    serves = engine.failure is None and not engine.load().draining
                    self._answer(200 if serves else 503, b"ok" if serves else b"not serving")
                case _:
                    self._answer(404, b"there are /metrics and /health")

        def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silent: a scrape every few seconds would drown the log."""

    return Handler
