"""Benchmark results as JSON, and as a table to print or paste into RESULTS.md."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine

SCHEMA = 1


def new_report(device: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"schema", "command", "machine", "settings", "results": []}, without results yet."""
    return {
        "schema": SCHEMA,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "settings": dict(settings),
        "results": [],
    }


def write_json(report: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def markdown(results: Sequence[Mapping[str, Any]], device: str) -> str:
    """Return a table with one row per variant of each result, without empty columns."""
    unit = "s" if device == "cuda" else "CPU-s"
    rows = [_cells(row, result, unit) for result in results for row in result["variants"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    used = [name for name in columns if any(row.get(name) for row in rows)]
    lines = ["| " + " | ".join(used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(row.get(name, "") for name in used) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], result: Mapping[str, Any], unit: str) -> dict[str, str]:
    workload = result["workload"]
    title = row["title"] + (f", {row['rows']} rows" if row.get("rows") else "")
    cells = {
        "model": result.get("model", ""),
        "documents": workload["name"],
        "labelled": f"{100 * workload['labelled']:.0f} %",
        "method": row["method"],
        "variant": title,
    }
    if "absent" in row:
        return cells | {f"real tokens/{unit}": row["absent"]}
    memory, mfu, wait = (row.get(key) for key in ("peak_memory_gib", "mfu", "data_wait"))
    return cells | {
        f"real tokens/{unit}": f"{row['tokens_per_second']:,.0f}",
        f"with a label/{unit}": f"{row['loss_tokens_per_second']:,.0f}",
        "slots": f"{row['slots']:,}",
        "fill": f"{100 * row['fill']:.0f} %",
        "over HF padded": ratio(row.get("over_hf_padded")),
        "over the fastest HF": ratio(row.get("over_fastest_hf")),
        "over full": ratio(row.get("over_full")),
        "MFU": "" if mfu is None else f"{100 * mfu:.1f} %",
        "peak GiB": "" if memory is None else f"{memory:.2f}",
        "kernels": f"{row['kernels']:,}" if "kernels" in row else "",
        "operators": f"{row['operators']:,}" if "operators" in row else "",
        "wait for data": "" if wait is None else f"{100 * wait:.2f} %",
    }


def ratio(pairs: Mapping[str, float] | None) -> str:
    """Format a ratio as median and range, for example 2.10 (2.06-2.17)."""
    if pairs is None:
        return ""
    return f"{pairs['median']:.2f} ({pairs['least']:.2f}-{pairs['most']:.2f})"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
