"""W&B's dashboard of a project: its panels as plain data, made from the declared metrics.

A panel is {"type": class of wandb_workspaces.reports.v2, ...: arguments of that class}. An argument
{"config": "optimizer.lr"} is a key of the runs' configuration, {"summary": "learning/target_loss"}
a run's last value of a metric.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from foundry_ext.records.metric import KINDS, MEAN_ACCURACY, Metric
from foundry_ext.training.logged_metrics import (
    METRICS,
    TOKENS,
    TRADE_OFF,
    LoggedMetric,
    metric_of,
)
from foundry_ext.utils.errors import UserError, naming

# What the sets of the shipped YAMLs measure; `mean_accuracy` is that of the paper's three tasks.
LEARNING = ("target_loss", "gsm8k_strict_match")
FORGETTING = ("source_loss", "source_kl", MEAN_ACCURACY)
MOST_RUNS = 100  # lines per panel; W&B shows 10 otherwise
_LEARNING_RATE = {"config": "optimizer.lr"}
_SCATTER_LEGEND = "${config:method}, seed ${config:seed}, ${run:displayName}"

Data = dict[str, Any]


def dashboard(
    entity: str,
    project: str,
    *,
    name: str = "foundry_ext",
    learning: Sequence[str] = LEARNING,
    forgetting: Sequence[str] = FORGETTING,
) -> Data:
    """Return the specification of a project's dashboard.

    Args:
        entity: W&B's user or team.
        project: the project; W&B makes it with its first run.
        name: the dashboard's name in W&B.
        learning: what is learned, as the record's keys name it, e.g. target_loss.
        forgetting: what is forgotten, likewise, e.g. source_kl.

    Raises:
        UserError: a key ends in no kind of figure.
    """
    learned = [_checked("learning", key) for key in learning]
    lost = [_checked("forgetting", key) for key in forgetting]
    sections = {
        TRADE_OFF: [_trade_off(x, y) for x in learned for y in lost],
        "Curves": [_curve(_key(metric), metric.title) for metric in (*learned, *lost)],
        "Learning rate": [_response(metric) for metric in (*learned, *lost)],
    }
    for metric in METRICS:
        if metric.section and metric.section != TRADE_OFF:
            sections.setdefault(metric.section, []).append(_panel(metric))
    sections["Meaning"] = [{"type": "MarkdownPanel", "markdown": _meaning()}]
    return {
        "entity": entity,
        "project": project,
        "name": name,
        "max_runs": MOST_RUNS,
        "sections": [
            {"name": title, "is_open": title in (TRADE_OFF, "Curves"), "panels": panels}
            for title, panels in sections.items()
        ],
    }


def _checked(role: str, key: str) -> Metric:
    key = key.removeprefix(f"{role}/")  # as W&B shows it
    metric = Metric(role, key)
    if "/" in key or key.startswith("_") or metric_of(f"{role}/{key}") is None:
        kinds = ", ".join(f"_{kind}" for kind in KINDS if metric_of(f"{role}/set_{kind}"))
        other = f", or {MEAN_ACCURACY}" if role == "forgetting" else ""
        raise UserError(f"--{role} {key}: must be a set's name with one of {kinds}{other}")
    return metric


def _key(metric: Metric) -> str:
    return f"{metric.role}/{metric.key}"


def _trade_off(learned: Metric, lost: Metric) -> Data:
    """Return the last values of two metrics, with a point per run."""
    return {
        "type": "ScatterPlot",
        "title": f"{lost.title} against {learned.title[0].lower()}{learned.title[1:]}",
        "x": {"summary": _key(learned)},
        "y": {"summary": _key(lost)},
        "legend_template": _SCATTER_LEGEND,
    }


def _response(metric: Metric) -> Data:
    """Return a metric's last values over the learning rate, with a point per run."""
    return {
        "type": "ScatterPlot",
        "title": f"{metric.title}, by learning rate",
        "x": _LEARNING_RATE,
        "y": {"summary": _key(metric)},
        "log_x": True,
        "legend_template": _SCATTER_LEGEND,
    }


def _curve(key: str, title: str) -> Data:
    """Return a line per method over real tokens: the mean of its runs, and their range."""
    metric = metric_of(key)
    assert metric is not None, key
    pattern = re.escape(key).replace(r"\*", ".*")
    return {
        "type": "LinePlot",
        "title": title,
        "x": TOKENS,
        **({"metric_regex": f"^{pattern}$"} if "*" in key else {"y": [key]}),
        "title_x": "real tokens",
        **({"title_y": metric.unit} if metric.unit else {}),
        "groupby": {"config": "method"},
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "minmax",
    }


def _panel(metric: LoggedMetric) -> Data:
    if metric.is_table:
        return {"type": "WeavePanelSummaryTable", "table_name": metric.key}
    return _curve(metric.key, metric.key)


def _meaning() -> str:
    """Return the Markdown table of the metrics that the dashboard shows."""
    lines = [
        "Lines are means over the runs of a method, with their range. Hide runs of other learning"
        " rates, or of another experiment, to leave them out.",
        "",
        "| metric | unit | meaning |",
        "|---|---|---|",
    ]
    for metric in METRICS:
        if metric.section:
            only = f"; only {metric.only}" if metric.only else ""
            lines.append(f"| `{metric.key}` | {metric.unit} | {metric.meaning}{only} |")
    return "\n".join(lines)


# --- W&B -----------------------------------------------------------------------------------------


def save(specification: Data) -> str:
    """Send the dashboard to W&B as a new view of the project; return its address.

    Raises:
        UserError: the extra `dashboard` is missing, W&B refuses the view, or there is no login.
    """
    workspace = to_workspace(specification)
    place = f"{specification['entity']}/{specification['project']}"
    asked = "is there a login, a project of this name, a way to the server?"
    problem = f"{place}: W&B did not take the dashboard ({asked})"
    # Any error, because W&B raises a plain Exception if the server refuses.
    with naming(problem, (Exception,)):
        return workspace.save().url


def to_workspace(specification: Data) -> Any:
    """Return the wandb_workspaces.workspaces.Workspace of a specification."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        raise UserError(
            "dashboard: wandb-workspaces is not installed; pip install 'foundry-ext[dashboard]', or"
            " print the specification by --dry-run"
        ) from error

    def argument(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "config" in value:
            return panels.Config(value["config"])
        return panels.SummaryMetric(value["summary"])

    def panel(data: Data) -> Any:
        kind, *arguments = data.items()
        return getattr(panels, kind[1])(**{name: argument(value) for name, value in arguments})

    def sections(data: Iterable[Data]) -> list[Any]:
        return [
            workspaces.Section(
                name=section["name"],
                is_open=section["is_open"],
                panels=[panel(one) for one in section["panels"]],
            )
            for section in data
        ]

    with naming(f"--name {specification['name']!r}"):
        return workspaces.Workspace(
            entity=specification["entity"],
            project=specification["project"],
            name=specification["name"],
            sections=sections(specification["sections"]),
            settings=workspaces.WorkspaceSettings(max_runs=specification["max_runs"]),
        )
