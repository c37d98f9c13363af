"""What Prometheus reads: counts and times of requests, and what the engine holds."""

import time
from collections import abc

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# What of `Engine.stats` is of now, and what counts up.
_GAUGES = {
    "lanes_busy": "lanes that decode",
    "lanes": "lanes that there are",
    "pages_held": "pages that answers hold",
    "pages_cached": "pages kept for prompts to come",
    "pages_free": "pages that hold nothing",
}
_COUNTS = {
    "forks": "blocks that were forked",
    "joins": "blocks that were joined",
    "decode_steps": "decode steps",
    "decode_tokens": "tokens drawn",
    "prefill_tokens": "tokens computed before decoding",
    "cached_tokens": "tokens of prompts that were not computed again",
    "preemptions": "answers that gave their pages back for others",
    "compilations": "programs compiled since the engine was made",
}


class Metrics:
    """The metrics of a server; names begin with `npr_`."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()

        def count(name: str, what: str, labels: abc.Sequence[str] = ()) -> Counter:
            return Counter(f"npr_{name}", what, labels, registry=registry)

        def times(name: str, what: str, buckets=_SECONDS) -> Histogram:
            return Histogram(f"npr_{name}_seconds", what, buckets=buckets, registry=registry)

        self.http = count("http_requests", "HTTP requests answered.", ("route", "status"))
        self.finished = count("answers_finished", "Answers, by why they ended.", ("reason",))
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts that were answered.")
        self.generation_tokens = count("generation_tokens", "Tokens of answers.")
        self.first = times("time_to_first_token", "From a request to its first token.")
        self.between = times("time_between_pieces", "Between two pieces of an answer.", _BETWEEN)
        self.whole = times("request", "From a request to its last token.")
        self.running = Gauge("npr_requests_running", "Requests being answered.", registry=registry)
        self.answers = Gauge("npr_answers_unfinished", "Answers unfinished.", registry=registry)
        self._engine = {
            name: Gauge(f"npr_engine_{name}", f"The engine's {what}.", registry=registry)
            for name, what in _GAUGES.items()
        }
        self._counts = {
            name: count(f"engine_{name}", f"The engine's {what}.") for name, what in _COUNTS.items()
        }
        self._before = dict.fromkeys(_COUNTS, 0.0)

    def engine(self, stats: abc.Mapping[str, float]) -> None:
        """Takes the engine's figures over."""
        for name, gauge in self._engine.items():
            gauge.set(stats[name])
        for name, counter in self._counts.items():
            counter.inc(max(0.0, stats[name] - self._before[name]))
            self._before[name] = stats[name]

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class Watch:
    """The times of one request."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._begun = metrics, time.monotonic()
        self._last: float | None = None
        metrics.running.inc()

    def heard(self, tokens: int) -> None:
        """So many tokens came with a visit: a piece, if there are any."""
        now = time.monotonic()
        if not tokens:
            return
        if self._last is None:
            self._metrics.first.observe(now - self._begun)
        else:
            self._metrics.between.observe(now - self._last)
        self._last = now

    def refused(self) -> None:
        """It was not taken."""
        self._metrics.running.dec()

    def end(self, prompt_tokens: int, tokens: int, reasons: abc.Iterable[str]) -> None:
        """It is over: answers ended for these reasons."""
        metrics = self._metrics
        metrics.running.dec()
        metrics.whole.observe(time.monotonic() - self._begun)
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.generation_tokens.inc(tokens)
        for reason in reasons:
            metrics.finished.labels(reason).inc()
