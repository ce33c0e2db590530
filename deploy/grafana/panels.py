"""What the dashboards are made of: variables, rows and panels in one style, with Grafana's own typed builders.

`$servers` in an expression becomes the label matchers of the servers that are chosen at the top of the dashboard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models import prometheus as prometheus_model

SERVERS: Final = 'job="$job", instance=~"$instance"'
SOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH: Final = 24  # of a dashboard, in Grafana's columns

Queries = Mapping[str, str]  # legend -> expression


def new(uid: str, title: str, description: str, *, info: str = "lossgrad_build_info") -> dashboard.Dashboard:
    """Return a dashboard with the choice of job and server; `info` is a metric that every one of them has."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["lossgrad"])
        .version(1)
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .timezone("browser")
        .refresh("10s")
        .time("now-15m", "now")
        .link(
            dashboard.DashboardLink("Other dashboards")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["lossgrad"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource")
            .label("Data source")
            .type("prometheus")
            .current(model.VariableOption(selected=True, text="Prometheus", value="prometheus"))
        )
        .with_variable(_choice("job", "Job", f"label_values({info}, job)").include_all(False))
        .with_variable(
            _choice("instance", "Server", f'label_values({info}{{job="$job"}}, instance)')
            .multi(True)
            .include_all(True)
            .all_value(".+")
            .current(model.VariableOption(selected=True, text="All", value="$__all"))
        )
    )


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )


def add_row(to: dashboard.Dashboard, title: str, panels: Sequence[Any]) -> None:
    """Add a row of panels that lie one beside the other and are as wide together as the dashboard, or several of those."""
    to.with_row(dashboard.Row(title))
    for panel in panels:
        to.with_panel(panel)


def _queries(panel: Any, queries: Queries, *, exemplars: bool = False, as_heatmap: bool = False) -> Any:
    panel.datasource(SOURCE)
    for index, (legend, expression) in enumerate(queries.items()):
        query = (
            prometheus.Dataquery()
            .ref_id(chr(ord("A") + index))
            .datasource(SOURCE)
            .expr(expression.replace("$servers", SERVERS))
            .legend_format(legend)
            .range()
        )
        if exemplars:
            query.exemplar(True)
        if as_heatmap:
            query.format(prometheus_model.PromQueryFormat.HEATMAP)
        panel.with_target(query)
    return panel


def graph(
    title: str,
    description: str,
    unit: str,
    queries: Queries,
    *,
    width: int = 8,
    most: float | None = None,
    is_stacked: bool = False,
    exemplars: bool = False,
    limit: float | None = None,
) -> timeseries.Panel:
    """Return lines over time. `most`: the axis' end. `limit`: where a red line is drawn."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .span(width)
        .height(8)
        .draw_style(common_model.GraphDrawStyle.LINE)
        .line_width(1)
        .fill_opacity(10)
        .show_points(common_model.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_model.LegendDisplayMode.TABLE)
            .placement(common_model.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["mean", "max"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_model.TooltipDisplayMode.MULTI)
            .sort(common_model.SortOrder.DESCENDING)
        )
    )
    if most is not None:
        panel.max(most)
    if is_stacked:
        panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL).group("A"))
    if limit is not None:
        panel.thresholds(_thresholds(red_from=limit)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode.LINE)
        )
    result: timeseries.Panel = _queries(panel, queries, exemplars=exemplars)
    return result


def number(
    title: str,
    description: str,
    unit: str,
    expression: str,
    *,
    width: int = 3,
    red_from: float | None = None,
    red_below: float | None = None,
) -> stat.Panel:
    """Return the last value as a number, with its course behind it, red from or below a value."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .span(width)
        .height(4)
        .graph_mode(common_model.BigValueGraphMode.AREA)
        .color_mode(common_model.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .no_value("-")
        .thresholds(_thresholds(red_from=red_from, red_below=red_below))
    )
    result: stat.Panel = _queries(panel, {"": expression})
    return result


def _thresholds(*, red_from: float | None = None, red_below: float | None = None) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=None, color="red" if red_below is not None else "green")]
    if red_below is not None:
        steps.append(model.Threshold(value=red_below, color="green"))
    if red_from is not None:
        steps.append(model.Threshold(value=red_from, color="red"))
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def labels_table(title: str, description: str, expression: str, *, hidden: Sequence[str], width: int) -> table.Panel:
    """Return the labels of the newest samples as a table, without those that are hidden."""
    return (
        table.Panel()
        .title(title)
        .description(description)
        .unit("none")
        .span(width)
        .height(4)
        .datasource(SOURCE)
        .with_target(
            prometheus.Dataquery()
            .ref_id("A")
            .datasource(SOURCE)
            .expr(expression.replace("$servers", SERVERS))
            .legend_format("")
            .format(prometheus_model.PromQueryFormat.TABLE)
            .instant()
        )
        .with_transformation(
            model.DataTransformerConfig(
                id_val="organize",
                options={"excludeByName": dict.fromkeys(["Time", "Value", "__name__", *hidden], True)},
            )
        )
    )


def spread(title: str, description: str, unit: str, expression: str, *, width: int = 8) -> heatmap.Panel:
    """Return a histogram's buckets over time, as a heat map."""
    panel = (
        heatmap.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .span(width)
        .height(8)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_model.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .scale(heatmap_model.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
    )
    result: heatmap.Panel = _queries(panel, {"{{le}}": expression}, as_heatmap=True)
    return result


def percentiles(
    metric: str, by: str = "", *, only: str = "$servers", shares: Sequence[float] = (0.5, 0.9, 0.99)
) -> Queries:
    """Return the percentiles of a histogram, one line each."""
    names = {0.5: "median", 0.9: "90 %", 0.99: "99 %", 0.999: "99.9 %"}
    groups = f"le, {by}" if by else "le"
    suffix = f" {{{{{by}}}}}" if by else ""
    return {
        names[share]
        + suffix: f"histogram_quantile({share}, sum by ({groups}) (rate({metric}_bucket{{{only}}}[$__rate_interval])))"
        for share in shares
    }


def rate(metric: str, by: str = "", *, more: str = "") -> str:
    """Return the rate of a counter, summed over servers, by labels."""
    matchers = "$servers" + (f", {more}" if more else "")
    inner = f"(rate({metric}{{{matchers}}}[$__rate_interval]))"
    return f"sum by ({by}) {inner}" if by else f"sum{inner}"


def mean(histogram: str, by: str = "") -> str:
    """Return the mean of what a histogram observed, by labels."""
    return f"{rate(histogram + '_sum', by)} / {rate(histogram + '_count', by)}"
