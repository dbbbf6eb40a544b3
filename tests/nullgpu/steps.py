"""Count one training step of each given case on the null GPU.

    python -m tests.nullgpu.steps '{"method": "lora", "layers": 2, "pack_tokens": 2048}' ...

A case's keys are those of `Case` and of the benchmarks' `Setup`. The weights are left as the
allocator gave them: nothing here reads a value.
"""

import dataclasses
import json
import sys
import time
from typing import Any

import torch

from benchmarks import variants
from benchmarks.variants import Bench, Setup
from benchmarks.workloads import packed_workload
from tests.nullgpu.counters import counting
from tests.nullgpu.kit import give

_INITIALISERS = ("normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Settings of a step besides its `Setup`."""

    variant: str = "ours"
    layers: int | None = None
    """None: as many as the model has."""
    pack_tokens: int = 16384
    num_packs: int = 1
    rows: int = 4
    """Rows of a padded microbatch."""
    rank: int = 64
    labelled: float = 1.0
    warm_up: int = 2
    reads_loss: bool = False
    """Whether the host reads the step's loss, for which it must wait."""


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Return counts of a step's calls, its waits, its peak memory, and compilations."""
    torch._dynamo.reset()
    names = {field.name for field in dataclasses.fields(Case)}
    case = Case(**{key: value for key, value in given.items() if key in names})
    others = {key: value for key, value in given.items() if key not in names}
    variants.RANK = case.rank
    overrides = {} if case.layers is None else {"num_hidden_layers": case.layers}
    setup = Setup(
        **{"device": "cuda", "precision": "amp_bf16", "config_overrides": overrides, **others}
    )
    with torch.device("cuda"):  # no weight is ever in the host's memory
        bench = Bench(setup)
    workload = packed_workload(
        "a",
        vocabulary=setup.config().vocab_size,
        labelled=case.labelled,
        pack_tokens=case.pack_tokens,
        num_packs=case.num_packs,
        microbatches=(case.rows,),
    )
    step = bench.step(case.variant, workload, case.rows)
    started = time.process_time()
    for _ in range(case.warm_up):
        step()
    warm_up = time.process_time() - started
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with counting() as counts:
        loss = step()
        if case.reads_loss:
            loss.item()
    started = time.process_time()
    step()
    return {
        "case": given,
        "operations": counts.operations,
        "calls": counts.calls,
        "waits": counts.waits,
        "kernels": counts.kernels,
        "gemm_flops": counts.gemm_flops,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "host_seconds": time.process_time() - started,
        "warm_up_seconds": warm_up,
        "graphs": graphs,
        "graphs_later": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "graph_breaks": dict(torch._dynamo.utils.counters["graph_break"]),
        "devices": sorted({str(p.device) for p in bench.source.parameters()}),
    }


def main() -> None:
    for name in _INITIALISERS:
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    results = []
    for text in sys.argv[1:]:
        results.append(measure(json.loads(text)))
        torch.cuda.empty_cache()
    give(results)


if __name__ == "__main__":
    main()
