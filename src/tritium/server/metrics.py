"""`/metrics`: counts for Prometheus. What the engine counts itself is read from its last report, on demand."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tritium.server.engine_client import EngineClient
from tritium.wire import Output

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GAUGES = {
    "num_running": ("tritium_requests_running", "Requests in flight."),
    "num_waiting": ("tritium_requests_waiting", "Requests that wait for their turn."),
    "num_blocks_used": ("tritium_kv_blocks_used", "KV blocks that requests hold."),
    "num_blocks_total": ("tritium_kv_blocks", "KV blocks there are."),
}
_COUNTERS = {
    "num_preemptions": ("tritium_preemptions", "Times a request lost its KV blocks and was recomputed."),
    "num_prefix_hit_tokens": ("tritium_prefix_hit_tokens", "Prompt tokens that the prefix cache spared."),
    "num_prefix_query_tokens": ("tritium_prefix_query_tokens", "Prompt tokens that were looked up in it."),
}


class ServerMetrics:
    """A registry of its own: two servers in one process do not share counts."""

    def __init__(self, client: EngineClient) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._registry.register(_EngineCollector(client))
        self._finished = Counter(
            "tritium_requests", "Requests that ended, by reason.", ["finish_reason"], registry=self._registry
        )
        self._prompt_tokens = Counter(
            "tritium_prompt_tokens", "Prompt tokens of requests that ended.", registry=self._registry
        )
        self._output_tokens = Counter(
            "tritium_output_tokens", "Output tokens of requests that ended.", registry=self._registry
        )
        self._first_token = _histogram(
            self._registry, "tritium_time_to_first_token_seconds", "From arrival at the engine to the first token."
        )
        self._per_token = _histogram(
            self._registry, "tritium_time_per_output_token_seconds", "Between tokens, the mean over a request."
        )
        self._latency = _histogram(
            self._registry, "tritium_request_seconds", "From arrival at the engine to the last token."
        )

    def note_finish(self, output: Output, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A request ended by itself, with this last output."""
        self._finished.labels(output.finish_reason).inc()
        if output.arrival is None or output.finished is None:  # refused
            return
        self._prompt_tokens.inc(num_prompt_tokens)
        self._output_tokens.inc(num_output_tokens)
        self._latency.observe(output.finished - output.arrival)
        if output.first_token is not None:
            self._first_token.observe(output.first_token - output.arrival)
            if num_output_tokens > 1:
                self._per_token.observe((output.finished - output.first_token) / (num_output_tokens - 1))

    def note_aborts(self, count: int) -> None:
        """Answers ended because their client, a neighbour in their HTTP request, or the engine did."""
        self._finished.labels("abort").inc(count)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        health = self._client.health
        is_ok = health.status == "ok"
        yield GaugeMetricFamily("tritium_engine_up", "1 when the engine computes, or would.", value=float(is_ok))
        yield CounterMetricFamily("tritium_engine_restarts", "Engine processes that died.", value=health.num_restarts)
        yield CounterMetricFamily("tritium_steps", "Batches computed by this engine process.", value=health.num_batches)
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(metric, text, value=health.stats.get(name, 0))
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, value=health.stats.get(name, 0))


def _histogram(registry: CollectorRegistry, name: str, text: str) -> Histogram:
    return Histogram(name, text, buckets=_SECONDS, registry=registry)
