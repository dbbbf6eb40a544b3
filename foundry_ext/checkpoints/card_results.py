"""A model card's results: what a run's record has measured at the step of these weights."""

from collections.abc import Iterator, Mapping
from typing import Any

from foundry_ext.checkpoints.provenance import Provenance
from foundry_ext.records.metric import MEAN_ACCURACY, Metric
from foundry_ext.utils.markdown import escape_markdown

_ABSENT = "–"


def results_of(provenance: Provenance, *, is_merged: bool) -> dict[str, Any]:
    """Return the template's values: a note, and a table if there is a measurement.

    Measurements of another step are left out, because they are not of these weights.
    """
    record, step = provenance.record, provenance.step
    nothing = {"columns": [], "results": [], "sets": []}
    if record is None:
        return {"results_note": "Not known.", **nothing}
    if step is None:
        note = "Not known, because nothing says after which step of the run these weights were."
        return {"results_note": note, **nothing}
    found = [entry for entry in record["evaluations"] if entry["step"] == step]
    if not found or not (found[-1]["learning"] or found[-1]["forgetting"]):
        note = f"The record has no measurement of learning or forgetting at step {step:,}."
        if record["status"] == "running":
            note += " The run had not ended when this was written."
        return {"results_note": note, **nothing}
    first = record["evaluations"][0]
    start = first["metrics"] if first["step"] == 0 else {}
    end = found[-1]
    merged = ", with the adapter not merged" if is_merged else ""
    return {
        "results_note": f"Measured by the run at step 0, before training, and at step"
        f" {step:,}{merged}. A positive change means more learned, or more forgotten. KL is the"
        " distance from the base model.",
        "columns": ["set (metric)", "unit", "step 0", f"step {step:,}", "change"],
        "results": [
            [*map(escape_markdown, _row(role, key, value, start, end["metrics"]))]
            for role in ("learning", "forgetting")
            for key, value in end[role].items()
        ],
        "sets": [escape_markdown(text) for text in _sets(record)],
    }


def _row(
    role: str, key: str, change: float, start: Mapping[str, float], end: Mapping[str, float]
) -> list[str]:
    metric = Metric(role, key)
    raw = f"{metric.set_name}/{metric.kind}"
    before, after = (
        metric.show(values[raw]) if raw in values and key != MEAN_ACCURACY else _ABSENT
        for values in (start, end)
    )
    unit = metric.unit if metric.unit != "points" else "% right"
    return [metric.title, unit, before, after, metric.show(change, signed=True)]


def _sets(record: Any) -> Iterator[str]:
    """Yield what each set consists of, without Composer's own evaluators."""
    for name, data in record["data"]["eval"].items():
        if not name.startswith("eval/"):
            count = "" if data["documents"] is None else f"{data['documents']:,} documents of "
            yield f"{name}: {count}{data['name']}"
