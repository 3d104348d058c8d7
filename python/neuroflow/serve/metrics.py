"""Metrics of a service, for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..patch import StreamSummary

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """The metrics of one service, in their own registry."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._frames = Counter("neuroflow_frames", "Frames that were answered", registry=registry)
        self._patches = Counter("neuroflow_patches", "Patches in these frames", registry=registry)
        self._encoded = Counter("neuroflow_patches_encoded", "Patches that were encoded", registry=registry)
        self._key_frames = Counter("neuroflow_key_frames", "Frames encoded in full", ["reason"], registry=registry)
        self._latency = Histogram(
            "neuroflow_latency_seconds", "Time from arrival to answer", buckets=SECONDS, registry=registry
        )
        self._pass = Histogram("neuroflow_pass_seconds", "Duration of a pass", buckets=SECONDS, registry=registry)
        self._together = Histogram(
            "neuroflow_pass_frames", "Frames in a pass", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.queue = Gauge("neuroflow_queue_requests", "Waiting requests", registry=registry)
        self.refused = Counter("neuroflow_refused", "Requests refused or failed", ["status"], registry=registry)

    def passed(self, frames: int, seconds: float) -> None:
        """Count a pass."""
        self._pass.observe(seconds)
        self._together.observe(frames)

    def answered(self, active: int, patches: int, key_frame: str | None, seconds: float) -> None:
        """Count a frame: the patches it encoded, and the seconds from its arrival to its answer."""
        self._frames.inc()
        self._patches.inc(patches)
        self._encoded.inc(active)
        self._latency.observe(seconds)
        if key_frame is not None:
            self._key_frames.labels(key_frame).inc()

    def text(self, streams: Mapping[str, StreamSummary], state_bytes: int, by_stream: bool) -> bytes:
        """All metrics in Prometheus' text format, with each stream's if asked for."""
        now = CollectorRegistry()
        now.register(_Streams(streams, state_bytes, by_stream))
        return generate_latest(self.registry) + generate_latest(now)


class _Streams(Collector):
    """Metrics read from open streams at the time of a scrape; closed streams leave nothing behind."""

    def __init__(self, streams: Mapping[str, StreamSummary], state_bytes: int, by_stream: bool) -> None:
        self._streams, self._state_bytes, self._by_stream = streams, state_bytes, by_stream

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("neuroflow_streams", "Open streams", value=len(self._streams))
        yield GaugeMetricFamily("neuroflow_state_bytes", "Memory that streams hold", value=self._state_bytes)
        if not self._by_stream:
            return
        frames = CounterMetricFamily("neuroflow_stream_frames", "Frames of a stream", labels=["stream"])
        key_frames = CounterMetricFamily(
            "neuroflow_stream_key_frames", "Frames of a stream encoded in full", labels=["stream"]
        )
        skipped = GaugeMetricFamily("neuroflow_stream_skipped_ratio", "Share of patches skipped", labels=["stream"])
        held = GaugeMetricFamily("neuroflow_stream_state_bytes", "Memory that a stream holds", labels=["stream"])
        for name, summary in self._streams.items():
            frames.add_metric([name], summary.frames)
            key_frames.add_metric([name], summary.key_frames)
            skipped.add_metric([name], summary.skipped)
            held.add_metric([name], summary.state_bytes)
        yield from (frames, key_frames, skipped, held)
