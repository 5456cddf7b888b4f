"""What Prometheus is told."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rank_search.service.asgi import App, Message, Receive, Scope, Send
from rank_search.service.events import Events
from rank_search.study.jobs import JobState, jobs
from rank_search.study.listing import study_lines
from rank_search.study.records import State
from rank_search.study.store import StudyStore

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Measures:
    """Counts requests, and tells of studies what the database says when it is asked."""

    def __init__(self, store: StudyStore, events: Events) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "rank_search_http_requests", "Requests.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "rank_search_http_seconds", "Seconds to the first byte.", ["route"], buckets=_BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        streams = Gauge("rank_search_event_streams", "Open event streams.", registry=self._registry)
        streams.set_function(lambda: events.open_streams)
        self._registry.register(_Studies(store))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it; reads the database.

        Raises:
            StorageError: it cannot be reached.
        """
        return generate_latest(self._registry)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered; ``route`` is the pattern, for addresses would make a series for every study."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class Counting:
    """Wraps the whole service, and counts what it answers, refused requests too."""

    def __init__(self, app: App, measures: Measures) -> None:
        self.app = app
        self._measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", None) or "other"
                self._measures.count(scope["method"], route, message["status"], time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, noting)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"})


class _Studies(Collector):
    def __init__(self, store: StudyStore) -> None:
        self._store = store

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []  # or the registry would read the database to find the names

    def collect(self) -> Iterable[GaugeMetricFamily]:
        trials = GaugeMetricFamily("rank_search_trials", "Trials of a study by state.", labels=["study", "state"])
        wanted = GaugeMetricFamily("rank_search_trials_wanted", "Finished trials wanted.", labels=["study"])
        points = GaugeMetricFamily("rank_search_front_points", "Points of a study's front.", labels=["study"])
        best = GaugeMetricFamily("rank_search_best_loss", "Lowest loss of a front, nats per unit.", labels=["study"])
        seconds = GaugeMetricFamily(
            "rank_search_measurement_seconds", "Seconds of all measurements of a study.", labels=["study"]
        )
        for line in study_lines(self._store.engine):
            name, status = line.record.name, line.status
            for state in State:
                trials.add_metric([name, state], getattr(status, state))
            wanted.add_metric([name], status.wanted)
            points.add_metric([name], line.front)
            seconds.add_metric([name], status.seconds)
            if status.best_loss is not None:
                best.add_metric([name], status.best_loss)
        states = [job.state for job in jobs(self._store.engine)]
        of_jobs = GaugeMetricFamily("rank_search_jobs", "Jobs by state.", labels=["state"])
        for job_state in JobState:
            of_jobs.add_metric([job_state], states.count(job_state))
        return [trials, wanted, points, best, seconds, of_jobs]
