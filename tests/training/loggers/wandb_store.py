"""W&B's server with a memory, on this machine: views, runs and sweeps, but no artifacts."""

import itertools
import json
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.training.loggers.wandb_server import Server


@dataclass
class StoredRun:
    """A run as the server holds it."""

    config: dict[str, Any] = field(default_factory=dict)
    """As the server keeps it: {"seed": {"value": 17, ...}, ...}."""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def logged(self) -> dict[str, set[str]]:
        """Keys by place, as panels name them."""
        config = {name: entry["value"] for name, entry in self.config.items()}
        return {
            "history": {key for row in self.history for key in row},
            "summary": set(self.summary),
            "config": {*config, *(f"optimizer.{key}" for key in config.get("optimizer", {}))},
        }


class Store(Server):
    """Server that keeps what it gets, and hands out the runs of one sweep, a grid."""

    def __init__(self):
        super().__init__()
        self.views: list[dict[str, Any]] = []
        self.runs: dict[str, StoredRun] = {}
        self.sweep: dict[str, Any] = {}
        self.num_agents = 0
        self.waiting: deque[dict[str, Any]] = deque()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        query = " ".join(query.split())
        name = re.match(r"(?:query|mutation) (\w+)", query)
        known = getattr(self, f"_{name[1]}", None) if name else None
        return super().answer(query, variables) if known is None else known(variables)

    def receive(self, path: str, body: bytes) -> None:
        match = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
        if match is None:
            return
        run = self.runs.setdefault(match[1], StoredRun())
        for file, part in (json.loads(body).get("files") or {}).items():
            rows = [json.loads(line) for line in part["content"]]
            if file == "wandb-history.jsonl":
                run.history += rows
            elif file == "wandb-summary.json":
                run.summary = rows[-1]

    # --- queries, by their names ----------------------------------------------------------------

    def _UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.views.append(variables)
        view = {"id": f"view{len(self.views)}", "name": variables["name"]}
        return {"upsertView": {"view": view, "inserted": True}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(variables["name"], StoredRun())
        run.config |= json.loads(variables.get("config") or "{}")
        return super().answer("upsertBucket", variables)

    def _RunUploadUrls(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {"node": {"name": name, "url": f"{self.address}/put", "updatedAt": None}}
            for name in variables["files"]
        ]
        bucket = {"id": "1", "files": {"uploadHeaders": [], "edges": nodes}}
        return {"model": {"bucket": bucket}}

    def _UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.sweep = yaml.safe_load(variables["config"])
        values = {
            name: entry.get("values", [entry.get("value")])
            for name, entry in sorted(self.sweep["parameters"].items())
        }
        for number, chosen in enumerate(itertools.product(*values.values())):
            arguments = {name: {"value": x} for name, x in zip(values, chosen, strict=True)}
            command = {"type": "run", "run_id": f"run{number}", "args": arguments}
            self.waiting.append({**command, "program": self.sweep["program"]})
        project = {"id": "1", "name": "trials", "entity": {"id": "1", "name": "me"}}
        sweep = {"name": "abcd1234", "project": project}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "1", "name": "abcd1234", "state": "RUNNING", "runs": {"edges": []}}
        return {"project": {"sweep": {**sweep, "config": yaml.safe_dump(self.sweep)}}}

    def _CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.num_agents += 1
        return {"createAgent": {"agent": {"id": f"agent{self.num_agents}"}}}

    def _Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Hand out the next run to an agent that has none; end it if there is none left."""
        commands = []
        if not json.loads(variables["runState"]):
            commands = [self.waiting.popleft() if self.waiting else {"type": "exit"}]
        agent = {"id": variables["id"]}
        return {"agentHeartbeat": {"agent": agent, "commands": json.dumps(commands)}}
