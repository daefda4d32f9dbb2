"""The worker as a whole, as metrics: who it is, whether it serves, and how its drain goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import PurePath

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loramux_worker.front import Front
from loramux_worker.pool import EnginePool


class FrontCollector(Collector):
    """Read when somebody looks at `/metrics`; `name` is the one that replies carry."""

    def __init__(
        self,
        name: str,
        model: str,
        pool: EnginePool,
        front: Front,
        *,
        is_ready: Callable[[], bool],
        drain_timeout: float,
    ) -> None:
        self._info = {"name": name, "model": PurePath(model).name, "version": version("loramux")}
        self._pool = pool
        self._front = front
        self._drain_timeout = drain_timeout
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        limits = self._pool.limits
        yield InfoMetricFamily(
            "loramux_worker", "This worker.", {**self._info, "device": limits.device, "dtype": limits.dtype}
        )
        gauges = (
            ("ready", "1 while /readyz says 200.", self._is_ready()),
            ("requests_in_flight", "Requests begun and not answered yet.", self._front.in_flight),
            ("requests_parked", "Requests read ahead that wait until their adapter has room.", self._front.parked),
            ("draining_seconds", "Time since the drain began, 0 before it.", self._front.draining_seconds),
            ("drain_timeout_seconds", "How long a drain may take (--drain-timeout).", self._drain_timeout),
        )
        for name, help_text, value in gauges:
            yield GaugeMetricFamily(f"loramux_{name}", help_text, value)
