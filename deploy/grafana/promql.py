"""The PromQL of the dashboards: each function gives an expression over the workers that a dashboard has chosen."""

from __future__ import annotations

WINDOW = "$window"
ERRORS = 'outcome!="ok"'
STAGES = ("queue", "adapter", "prefill", "decode")


class Metrics:
    """Expressions over metrics of `loramux_`, of the series that `selector` matches."""

    def __init__(self, selector: str) -> None:
        self._selector = selector

    def of(self, name: str, more: str = "") -> str:
        """A metric's series as they are."""
        return f"loramux_{name}{{{self._selector}{',' if more else ''}{more}}}"

    def total(self, name: str, by: str = "", more: str = "") -> str:
        """The sum of a gauge."""
        return f"sum{_by(by)}({self.of(name, more)})"

    def rate(self, name: str, by: str = "", more: str = "") -> str:
        """A counter's growth a second."""
        return f"sum{_by(by)}(rate({self.of(name, more)}[{WINDOW}]))"

    def quantile(self, q: float, histogram: str, by: str = "") -> str:
        """A quantile of a histogram."""
        labels = f"le, {by}" if by else "le"
        return f"histogram_quantile({q}, {self.rate(f'{histogram}_bucket', labels)})"

    def mean(self, name: str, by: str = "", more: str = "") -> str:
        """The mean of a histogram or a summary."""
        return f"{self.rate(f'{name}_sum', by, more)} / {self.rate(f'{name}_count', by, more)}"

    def quantiles(self, histogram: str) -> tuple[tuple[str, str], ...]:
        """The median and what lies above, as queries of a panel."""
        return tuple((self.quantile(q, histogram), f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99))


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
