"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from l2s_jax.serving.lane import Lane
from l2s_jax.serving.output import Drafts

_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1, 2, 5, 10, 20, 60, 120, 600, float("inf")),
)
_STEPS = (*(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), float("inf"))


class _Lanes(Collector):
    """Where the lanes stand, asked when somebody looks."""

    def __init__(self, lanes: Callable[[], Mapping[str, Lane]]):
        self._lanes = lanes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gauges = {
            "waiting": "Responses that have no slot yet.",
            "running": "Responses that have a slot.",
            "batch_size": "Slots of the program that decodes.",
        }
        for name, meaning in gauges.items():
            family = GaugeMetricFamily(f"l2s_{name}", meaning, labels=["model"])
            for model, lane in self._lanes().items():
                values = {
                    "waiting": len(lane.waiting),
                    "running": lane.running,
                    "batch_size": lane.size,
                }
                family.add_metric([model], values[name])
            yield family


class Metrics:
    """Counters and histograms of one server; times are in seconds."""

    def __init__(self, lanes: Callable[[], Mapping[str, Lane]]):
        self.registry = CollectorRegistry()
        self.registry.register(_Lanes(lanes))
        self._requests = Counter(
            "l2s_requests",
            "Requests that were answered, by HTTP status.",
            ["model", "endpoint", "status"],
            registry=self.registry,
        )

        def seconds(name: str, meaning: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(
                f"l2s_{name}_seconds", meaning, ["model"], buckets=buckets, registry=self.registry
            )

        def tokens(name: str, meaning: str) -> Counter:
            return Counter(f"l2s_{name}_tokens", meaning, ["model"], registry=self.registry)

        self._first = seconds("time_to_first_token", "From arrival to a response's first token.")
        self._each = seconds(
            "time_per_output_token", "Of a response's tokens after the first, the mean.", _STEPS
        )
        self._whole = seconds("response", "From a response's arrival to its end.")
        self._prompt = tokens("prompt", "Tokens of prompts, each prompt once.")
        self._generated = tokens("generated", "Tokens of responses.")
        self._drafted = tokens("drafted", "Of exact decoding: drafted tokens that were looked at.")
        self._accepted = tokens("accepted", "Of exact decoding: drafted tokens that were kept.")

    def answered(self, model: str, endpoint: str, status: int) -> None:
        """A request was answered; `model` is "" where it named none that there is."""
        self._requests.labels(model, endpoint, str(status)).inc()

    def read(self, model: str, tokens: int) -> None:
        """A prompt came."""
        self._prompt.labels(model).inc(tokens)

    def ended(
        self, model: str, tokens: int, first_s: float | None, whole_s: float, drafts: Drafts | None
    ) -> None:
        """A response ended; first_s: until its first token, if there was one."""
        self._whole.labels(model).observe(whole_s)
        self._generated.labels(model).inc(tokens)
        if first_s is not None:
            self._first.labels(model).observe(first_s)
            if tokens > 1:
                self._each.labels(model).observe((whole_s - first_s) / (tokens - 1))
        if drafts is not None:
            self._drafted.labels(model).inc(sum(drafts.tested))
            self._accepted.labels(model).inc(sum(drafts.passed))

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)
