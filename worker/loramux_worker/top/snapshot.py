"""One worker's `/metrics` at one moment."""

from __future__ import annotations

import itertools
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from loramux_worker.errors import ConfigurationError

PREFIX = "loramux_"
_MAX_PAGE = 32 << 20  # bytes; a worker's has some hundred thousand


@dataclass(frozen=True, slots=True)
class Sample:
    """A value of a metric; `labels` without the ones that are empty."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The samples of a page by metric name (without the prefix), and when it was read, in monotonic seconds."""

    at: float
    samples: dict[str, list[Sample]]

    def of(self, name: str, **labels: str) -> Iterator[Sample]:
        """The samples that have these labels."""
        for sample in self.samples.get(name, ()):
            if all(sample.labels.get(label) == value for label, value in labels.items()):
                yield sample

    def total(self, name: str, **labels: str) -> float:
        """Their sum."""
        return sum(sample.value for sample in self.of(name, **labels))


def parse(page: str, at: float) -> Snapshot:
    """The metrics of ours on a page in Prometheus' text format. Raises ValueError for what is none."""
    samples: dict[str, list[Sample]] = {}
    try:
        families = list(text_string_to_metric_families(page))
    except ValueError:
        raise ValueError("it is no page of metrics") from None
    for sample in itertools.chain.from_iterable(family.samples for family in families):
        if sample.name.startswith(PREFIX):
            name = sample.name.removeprefix(PREFIX)
            samples.setdefault(name, []).append(Sample(sample.labels, sample.value))
    if not samples:
        raise ValueError("it has no metrics of a loramux worker")
    return Snapshot(at, samples)


def read(url: str, timeout: float) -> Snapshot:
    """Fetch and parse a worker's page.

    Raises:
        ConnectionError: it is away, or is no worker; the message is one short line.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:  # noqa: S310 - checked by `metrics_url`
            return parse(response.read(_MAX_PAGE).decode(), time.monotonic())
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        reason = error.reason
        raise ConnectionError(reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)) from None
    except TimeoutError:
        raise ConnectionError(f"no answer within {timeout:g} s") from None
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionError(str(error) or type(error).__name__) from None


def metrics_url(text: str) -> str:
    """The page that a person means: `host:port`, with or without `http://` and `/metrics`.

    Raises:
        ConfigurationError: it is no such address.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed:
        raise ConfigurationError(f"{text}: say a worker's address as host:port or http://host:port")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/metrics') else f'{path}/metrics'}"
