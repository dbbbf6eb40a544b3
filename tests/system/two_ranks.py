"""One rank of test_two_ranks.py: builds each given loader and writes what it received.

python -m tests.system.two_ranks TOKENIZER LOADERS_JSON OUT BUCKET
"""

import functools
import json
import shutil
import sys
from pathlib import Path

import torch
from composer.devices import DeviceCPU
from composer.utils import dist
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.data.finetuning import dataloader as llm_foundrys
from transformers import AutoTokenizer

from tests.data.kit import split_documents

STOP_AFTER = 3


def copy_from(bucket: str, path: str, destination: str, overwrite: bool):
    """Copy a file from a folder, in place of Composer's `get_file` and an object store."""
    target = Path(destination)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(Path(bucket, path.removeprefix("s3://bucket/")), target)


def main(tokenizer_folder: str, loaders: str, out: str, bucket: str):
    llm_foundrys.get_file = functools.partial(copy_from, bucket)
    dist.initialize_dist(DeviceCPU(), timeout=60.0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rank, found = dist.get_global_rank(), {}
    torch.manual_seed(rank)
    for name, section in json.loads(loaders).items():
        spec = build_dataloader(section, tokenizer, 2)
        loader = spec.dataloader
        loader.batch_sampler.set_epoch(1)
        batches = []
        for batch in loader:
            batches.append([split_documents(pack) for pack in batch])
            if len(batches) == STOP_AFTER:
                state = loader.dataset.state_dict()
        torch.save(state, f"{out}.{name}.rank{rank}.pt")
        found[name] = {
            "length": len(loader),
            "batches": batches,
            "fingerprint": loader.dataset.fingerprint,
            "plan": loader.batch_sampler.plan_digest(1),
            "num_documents": len(loader.dataset),
        }
    with open(f"{out}.rank{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
