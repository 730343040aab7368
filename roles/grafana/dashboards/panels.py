"""Shared parts of dashboards: variables, links, annotations, and panels with a unit and a description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RED, YELLOW, GREEN = "red", "yellow", "green"
Panel = stat.Panel | table.Panel | timeseries.Panel
Steps = Sequence[tuple[float, str]]

# Links of a series by its labels.
LINKS = {
    "job_id": ("Training run of job ${__field.labels.job_id}", "/d/ictx-training?var-job=${__field.labels.job_id}"),
    "node": ("Node ${__field.labels.node}", "/d/ictx-nodes?var-node=${__field.labels.node}"),
    "gpu": ("GPUs of ${__field.labels.node}", "/d/ictx-gpu?var-node=${__field.labels.node}"),
    "model_name": ("Serving of ${__field.labels.model_name}", "/d/ictx-serving?var-model=${__field.labels.model_name}"),
    "pod": ("Pod ${__field.labels.pod}", "/d/ictx-kubernetes?var-pod=${__field.labels.pod}"),
}


def start(uid: str, title: str, text: str, variables: Mapping[str, str]) -> Dashboard:
    """Returns an empty dashboard.

    Args:
        uid: suffix of its UID, `ictx-<uid>`.
        variables: query of each variable after `datasource` and `cluster`, by name.
    """
    made = (
        Dashboard(title)
        .uid(f"ictx-{uid}")
        .description(text)
        .tags(["ictx"])
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Dashboards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["ictx"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(variable("cluster", "label_values(up, cluster)", many=False))
    )
    for name, query in variables.items():
        made = made.with_variable(variable(name, query))
    for name, expression, color in (
        ("Drains", 'changes(slurm_node_available{cluster="$cluster"}[1m]) > 0', "orange"),
        ("Job starts and requeues", 'changes(slurm_job_running_since_seconds{cluster="$cluster"}[2m]) > 0', "blue"),
        ("Deploys", 'changes(process_start_time_seconds{app=~"serving|mlflow"}[2m]) > 0', "purple"),
    ):
        made = made.annotation(
            dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expression)
        )
    return made


def variable(name: str, query: str, many: bool = True) -> dashboard.QueryVariable:
    """Returns a variable with the values of a query; `many` allows multiple values and defaults to all."""
    made = (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
    return made.multi(True).include_all(True).all_value(".*") if many else made


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    """Returns colours by lower bound; green below the first value."""
    first = [models.Threshold(value=None, color=GREEN)]
    rest = [models.Threshold(value=value, color=color) for value, color in steps]
    if steps and steps[0][0] == float("-inf"):
        first, rest = [models.Threshold(value=None, color=steps[0][1])], rest[1:]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(first + rest)


def queries(panel: Panel, asked: Mapping[str, str], instant: bool = False) -> Panel:
    """Adds queries, by the legend of their series."""
    for number, (legend, expression) in enumerate(asked.items()):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
        query = query.instant().format(PromQueryFormat.TABLE) if instant and isinstance(panel, table.Panel) else query
        panel = panel.with_target(query.instant() if instant else query.range())
    labels = [label for label in LINKS if any(f"{{{{{label}}}}}" in legend for legend in asked)]
    if isinstance(panel, timeseries.Panel):
        panel = panel.data_links([dashboard.DashboardLink(LINKS[label][0]).url(LINKS[label][1]) for label in labels])
    return panel


def mean(name: str, by: str, chosen: str) -> str:
    """Returns the query of a histogram's (or summary's) mean over five minutes."""
    each = [f"sum by ({by}) (rate({name}_{part}{{{chosen}}}[5m]))" for part in ("sum", "count")]
    return " / ".join(each)


def graph(
    title: str,
    text: str,
    unit: str,
    asked: Mapping[str, str],
    steps: Steps = (),
    top: float | None = None,
    stacked: bool = False,
) -> timeseries.Panel:
    """Returns a time series panel of half the dashboard's width; `steps` are drawn as lines.

    Args:
        top: upper end of the axis, which then begins at 0.
        stacked: whether series are stacked as areas.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .datasource(SOURCE)
        .height(8)
        .span(12)
        .line_width(1)
        .fill_opacity(8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .thresholds(thresholds(steps))
    )
    if steps:
        panel = panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
        )
    if top is not None:
        panel = panel.min(0).max(top)
    if stacked:
        stacking = common.StackingConfig().group("A").mode(common_models.StackingMode.NORMAL)
        panel = panel.min(0).fill_opacity(60).stacking(stacking)
    return queries(panel, asked)


def number(title: str, text: str, unit: str, expression: str, steps: Steps = (), width: int = 4) -> stat.Panel:
    """Returns one number, coloured by `steps`."""
    panel = (
        stat.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .datasource(SOURCE)
        .height(4)
        .span(width)
        .no_value("none")
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(common_models.BigValueColorMode.BACKGROUND if steps else common_models.BigValueColorMode.VALUE)
        .thresholds(thresholds(steps))
    )
    return queries(panel, {"": expression}, instant=True)


def listing(title: str, text: str, expression: str, unit: str = "none", width: int = 24) -> table.Panel:
    """Returns the series of a query as a table of their labels and values."""
    panel = table.Panel().title(title).description(text).unit(unit).datasource(SOURCE).height(8).span(width)
    panel = panel.align(common_models.FieldTextAlignment.AUTO)
    return queries(panel, {"": expression}, instant=True)


def row(made: Dashboard, title: str, *panels: Panel) -> Dashboard:
    """Adds a row with its panels."""
    made = made.with_row(dashboard.Row(title))
    for panel in panels:
        made = made.with_panel(panel)
    return made
