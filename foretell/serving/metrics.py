"""Prometheus metrics under vLLM's names, so that dashboards for vLLM read them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from foretell.serving.engine import Engine
from foretell.serving.requests import Piece

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)  # seconds
SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
COUNTED = {  # of Engine.metrics: name, what it counts
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens of requests that were taken."),
    "generation_tokens": ("vllm:generation_tokens", "Tokens of answers."),
    "drafts": ("vllm:spec_decode_num_drafts", "Verifications with drafts."),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Drafts that were verified."),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens that were looked for in the cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Those of them that it had."),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens", "Drafts that were accepted."),
}


class Metrics:
    """What the engine counts, and what is timed and refused around it."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model = engine, model
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def timed(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}_seconds", about, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model)

        self.first = timed("time_to_first_token", "From the request to its first token.", SLOW)
        self.between = timed("inter_token_latency", "Between tokens; those of one verification share its time.", FAST)
        self.whole = timed("e2e_request_latency", "From the request to its end.", SLOW)
        about = "Requests that were not taken, by reason."
        self._refused = Counter("foretell:requests_rejected", about, ["model_name", "reason"], registry=self.registry)

    def refused(self, reason: str) -> None:
        """A request was not taken."""
        self._refused.labels(self.model, reason).inc()

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks: the engine's numbers as they stand."""
        now, label = self.engine.metrics(), ["model_name"]
        for state in ("running", "waiting"):
            gauge = GaugeMetricFamily(f"vllm:num_requests_{state}", f"Requests that are {state}.", labels=label)
            gauge.add_metric([self.model], now[state])
            yield gauge
        for key, (name, about) in COUNTED.items():
            counter = CounterMetricFamily(name, about, labels=label)
            counter.add_metric([self.model], now[key])
            yield counter
        name, about = "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted drafts by position, from 0."
        counter = CounterMetricFamily(name, about, labels=["model_name", "position"])
        for position, count in enumerate(now["accepted_per_position"]):
            counter.add_metric([self.model, str(position)], count)
        yield counter
        counter = CounterMetricFamily(
            "vllm:request_success", "Requests by their end.", labels=[*label, "finished_reason"]
        )
        for reason, count in now["requests"].items():
            counter.add_metric([self.model, reason], count)
        yield counter

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class Times:
    """Of one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.asked = time.monotonic()
        self.last: float | None = None  # when tokens last came

    def saw(self, piece: Piece) -> None:
        """A piece has come."""
        now = time.monotonic()
        if piece.tokens and self.last is None:
            self.metrics.first.observe(now - self.asked)
        elif piece.tokens:
            for _ in piece.tokens:
                self.metrics.between.observe((now - self.last) / len(piece.tokens))
        if piece.tokens:
            self.last = now
        if piece.finish_reason is not None:
            self.metrics.whole.observe(now - self.asked)
