"""The words that the dashboards are made of: variables and panels, 24 columns wide."""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    IntervalVariable,
    QueryVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import common as words
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")

Query = tuple[str, str]
"""A PromQL expression, and what its lines are called."""


def figure(
    title: str, expr: str, unit: str, help_text: str, *, bad_from: float | None = None, good_from: float | None = None
) -> stat.Panel:
    """One figure of now, red from one bound on or up to the other."""
    steps = [Threshold(value=None, color="green" if good_from is None else "red")]
    if bad_from is not None:
        steps.append(Threshold(value=bad_from, color="red"))
    if good_from is not None:
        steps.append(Threshold(value=good_from, color="green"))
    return (
        stat.Panel()
        .title(title)
        .description(help_text)
        .datasource(SOURCE)
        .unit(unit)
        .graph_mode(words.BigValueGraphMode.AREA)
        .color_mode(words.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(_target(0, (expr, title)))
        .span(4)
        .height(4)
    )


def lines(
    title: str, unit: str, help_text: str, *queries: Query, stacked: bool = False, span: int = 8
) -> timeseries.Panel:
    """Lines over time, with a table of their last and largest values."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(help_text)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .line_width(1)
        .fill_opacity(30 if stacked else 8)
        .tooltip(common.VizTooltipOptions().mode(words.TooltipDisplayMode.MULTI).sort(words.SortOrder.DESCENDING))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(words.LegendDisplayMode.TABLE)
            .placement(words.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
        )
        .span(span)
        .height(9)
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(words.StackingMode.NORMAL))
    for i, query in enumerate(queries):
        panel.with_target(_target(i, query))
    return panel


def new_dashboard(name: str, description: str, *variables: QueryVariable) -> Dashboard:
    """An empty dashboard with its variables: data source, job, those of its own, and the window of its rates."""
    dashboard = (
        Dashboard(f"loramux / {name}")
        .uid(f"loramux-{name}")
        .description(description)
        .tags(["loramux"])
        .editable()
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(
            DashboardLink("loramux")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["loramux"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(DatasourceVariable("datasource").label("data source").type("prometheus"))
        .with_variable(choice("job", "label_values(loramux_worker_info, job)"))
    )
    for variable in variables:
        dashboard.with_variable(variable)
    window = IntervalVariable("window").label("rates over").values("1m,5m,15m,1h,6h")
    return dashboard.with_variable(window.current(VariableOption(selected=True, text="5m", value="5m")))


def choice(name: str, query: str) -> QueryVariable:
    """A variable whose values are a label's; all of them are chosen at first."""
    return (
        QueryVariable(name)
        .label(name)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def worker_choice() -> QueryVariable:
    """The workers, by the address that Prometheus scrapes."""
    return choice("worker", 'label_values(loramux_worker_info{job=~"$job"}, instance)')


def _target(index: int, query: Query) -> Dataquery:
    expr, legend = query
    return Dataquery().ref_id(chr(ord("A") + index)).expr(expr).legend_format(legend).datasource(SOURCE)
