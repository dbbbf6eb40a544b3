"""A shipped YAML, trained by Composer on the null GPU.

    python -m tests.nullgpu.whole_runs counted yamls/smollm2_full.yaml
    python -m tests.nullgpu.whole_runs emulated yamls/smollm2_full.yaml TOKENIZER
    python -m tests.nullgpu.whole_runs explained yamls/smollm2_full.yaml
    python -m tests.nullgpu.whole_runs quickstart full.yaml dora.yaml

`counted` trains the YAML's own shape for three steps and counts the last one. `emulated` trains a
tiny shape for a step with values, with every callback and evaluation of the YAML. `explained`
trains like `counted`, and returns train.py's explanation of the error that ends the run.
`quickstart` trains the quickstart's base model and fine-tunes it, two steps each, with values.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from composer.core import Callback, State
from composer.loggers import Logger
from omegaconf import OmegaConf

from tests.nullgpu.kit import give

STEPS = 3


class CountTheLastStep(Callback):
    """Counts the last step; evaluation and saving come after it."""

    counts: Any = None

    def __init__(self):
        from tests.nullgpu.counters import counting

        self.counting = counting()

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == STEPS - 1:
            CountTheLastStep.counts = self.counting.__enter__()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.counts is not None:
            self.counting.__exit__(None, None, None)


@contextlib.contextmanager
def changed_to(folder: str) -> Iterator[None]:
    """Change to a folder; contextlib.chdir is Python 3.11's."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def counted(path: Path, *overrides: str) -> dict[str, Any]:
    """Return what the last step asked of the device, and what the run ended with."""
    from llmfoundry.command_utils import train
    from llmfoundry.registry import callbacks

    from benchmarks.offline import offline_config

    callbacks.register("count_the_last_step", func=CountTheLastStep)
    with tempfile.TemporaryDirectory() as folder:
        config = offline_config(path, Path(folder), steps=STEPS, overrides=overrides)
        config["callbacks"]["count_the_last_step"] = {}
        trainer = train(OmegaConf.create(config))
        trainer.close()
        import torch

        model: Any = trainer.state.model
        return {
            "steps": trainer.state.timestamp.batch.value,
            "operations": CountTheLastStep.counts.operations,
            "waits": CountTheLastStep.counts.waits,
            "devices": sorted({str(p.device) for p in model.parameters()}),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "compiled": model.inner_model.model.layers[0].compiled is not None,
            "settings": {key: config["model"].get(key) for key in ("compile", "loss")},
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        }


def emulated(path: Path, tokenizer: str, *overrides: str) -> dict[str, Any]:
    """Return the record of a tiny run: on the null GPU where there is one, in fp32 on the CPU else.

    Composer trains in no other precision on a CPU.
    """
    path = path.absolute()
    import torch

    from foundry_ext.config.loading import load_config
    from tests.yamls.test_yamls import load_dataset, take_step

    datasets.load_dataset = load_dataset  # rows of each data set's columns

    mode: Any = contextlib.nullcontext()
    if torch.cuda.is_available():
        from tests.nullgpu.emulate import Emulate

        mode = Emulate()
    with tempfile.TemporaryDirectory() as folder, changed_to(folder), mode:
        config = load_config(path, [*overrides, "variables.compile=none"])
        precision = "amp_bf16" if torch.cuda.is_available() else "fp32"
        return take_step(config, Path(tokenizer), precision)


def explained(path: Path, *overrides: str) -> str | None:
    """Return the explanation of the error that ends the run; None if it ends well."""
    from foundry_ext.config.loading import load_config
    from foundry_ext.launch.failures import explain

    try:
        counted(path, *overrides)
    except RuntimeError as error:  # torch's OutOfMemoryError is one
        config: Any = OmegaConf.to_container(load_config(path, overrides), resolve=True)
        config["model"] |= {"pretrained_model_name_or_path": "smollm2-135m"}
        return explain(error, config)
    return None


def quickstart(*names: str) -> list[dict[str, Any]]:
    """Return the records of the quickstart's base model and of its YAMLs' runs, cut to two steps.

    Attention is sdpa: in fp32 `auto` takes FlexAttention, which is Triton's and has no values here.
    """
    from llmfoundry.command_utils import train

    from experiments.quickstart.data import prepare
    from foundry_ext.config.loading import load_config
    from foundry_ext.records.record import read_record
    from tests.nullgpu.emulate import Emulate

    yamls = Path("yamls/quickstart").absolute()
    cut = ["max_duration=2ba", "eval_interval=2ba", "model.attention_backend=sdpa"]
    small = ["callbacks.forgetting.sets.library.max_documents=4"]
    records = []
    with tempfile.TemporaryDirectory() as folder, changed_to(folder):
        prepare(Path("outputs/quickstart"))
        for name in ("base.yaml", *names):
            config = load_config(yamls / name, cut + (small if records else []))
            with Emulate():
                train(config).close()
            records.append(read_record(Path(config.callbacks.run_record.path)))
    return records


if __name__ == "__main__":
    task, *given = sys.argv[1:]
    if task == "quickstart":
        give(quickstart(*given))
    else:
        work = {"counted": counted, "emulated": emulated, "explained": explained}[task]
        give(work(Path(given[0]), *given[1:]))
