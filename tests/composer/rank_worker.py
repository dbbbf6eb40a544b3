"""What each rank of tests/composer/test_ranks.py runs: composer -n 2 rank_worker.py FOLDER.

FOLDER/job.json says what; rank 0 writes FOLDER/result.pt.
"""

import json
import sys
from pathlib import Path

import torch
from composer.utils import dist

from tests.composer import kit


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    world = kit.World(**{name: Path(path) for name, path in job["world"].items()})
    result = {}
    for name, settings in job["runs"].items():
        run = kit.run(kit.run_config(world, folder / name, **settings))
        result[name] = {
            "losses": run.losses,
            "gradients": run.spy.gradients,
            "packs": [len(batch) for batch in run.spy.batches],
            "clock": [
                int(run.trainer.state.timestamp.sample),
                int(run.trainer.state.timestamp.token),
            ],
            "metrics": {key: value[-1] for key, value in run.all_logged("metrics/eval/").items()},
            "throughput": run.all_logged("packing/"),
        }
    if dist.get_global_rank() == 0:
        torch.save(result, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
