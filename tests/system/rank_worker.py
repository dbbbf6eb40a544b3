"""Program of each rank of tests/system/ranks.py: composer -n 2 rank_worker.py FOLDER.

It reads its job from FOLDER/job.json; rank 0 writes FOLDER/result.pt.
"""

import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch.distributed.tensor import DTensor

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from tests.training import kit


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    result = {}
    for name, settings in job["runs"].items():
        paths = {**job["world"], **settings.pop("world", {})}
        world = kit.World(**{key: Path(path) for key, path in paths.items()})
        spoil(settings.pop("spoil", None))
        try:
            run = kit.run(kit.run_config(world, folder / name, **settings))
        except FloatingPointError as error:
            result[name] = {"errors": dist.all_gather_object(str(error))}
            continue
        result[name] = describe(run)
    if dist.get_global_rank() == 0:
        torch.save(result, folder / "result.pt")
    # Together: a rank that leaves while another still works was seen to abort in gloo's threads.
    dist.barrier()
    torch.distributed.destroy_process_group()


def describe(run: kit.Run) -> dict[str, Any]:
    state = run.trainer.state
    model = state.model.module if state.is_model_ddp else state.model
    inner = model.inner_model
    documents = [
        [ids.tolist() for ids, _ in kit.documents_of(batch)] if batch else []
        for batch in run.spy.batches
    ]
    return {
        "losses": run.losses,
        "gradients": run.spy.gradients,
        "packs": [len(batch) for batch in run.spy.batches],
        "clock": [int(state.timestamp.sample), int(state.timestamp.token)],
        "metrics": {key: value[-1] for key, value in run.all_logged("metrics/eval/").items()},
        "throughput": run.all_logged("packing/"),
        "weights": {name: whole(x) for name, x in model.model.named_parameters()},
        "is_tied": inner.lm_head.weight is inner.model.embed_tokens.weight,
        "guard": run.all_logged("guard/"),
        # Of every rank: its documents, batch by batch.
        "documents": dist.all_gather_object(documents),
    }


def whole(x: Any) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


_forward = SmolLM2ForCausalLM.forward


def spoil(document: list[int] | None) -> None:
    """Make the loss of any batch with this document NaN."""

    @functools.wraps(_forward)
    def spoilt(self, *args, **kwargs):
        output = _forward(self, *args, **kwargs)
        ids, ends = kwargs["input_ids"][0].tolist(), kwargs["cu_seqlens"].tolist()
        if any(ids[start:end] == document for start, end in itertools.pairwise(ends)):
            output.loss = output.loss * float("nan")
        return output

    SmolLM2ForCausalLM.forward = _forward if document is None else spoilt


if __name__ == "__main__":
    main(Path(sys.argv[1]))
