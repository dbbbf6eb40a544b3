"""Real tokens per second of a training step: ours, packed, against Hugging Face's padded SDPA.

    python benchmarks/step_time.py

One step is forward and backward of SmolLM2-135M with random weights on the same documents. Only
real tokens are counted, on both sides. Baseline and ours alternate, and the ratio is taken pair by
pair, so that what else the machine does falls on both. On a CPU time is the process's CPU time.
"""

import argparse
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from foundry_ext.models.attention import resolve_backend
from foundry_ext.models.flops import peak_flops, training_flops
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

CONFIGS = Path(__file__).parents[1] / "foundry_ext" / "models" / "configs"
# Medians and sigmas of log-normal lengths: instruction tuning, code, chat.
LENGTHS = {"a": (350, 0.9), "b": (600, 1.4), "c": (80, 0.7)}
LONGEST = 2048


@dataclass
class Case:
    """Documents of one step, with the share of their tokens, at the end, that has a label."""

    lengths: list[int]
    pad_to: int
    labelled: float

    def num_loss_tokens(self) -> int:
        return sum(min(round(length * self.labelled), length - 1) for length in self.lengths)


def draw_lengths(name: str, count: int, *, fill: float, pad_to: int | None) -> list[int]:
    """Lengths from the named distribution whose padded batch is `fill` full.

    Fill decides the ratio more than anything else, and of 8 documents it scatters from .2 to .8, so
    of a thousand draws the one nearest to the wanted fill is taken.

    Args:
        pad_to: slots a row has; None for the longest document.
    """
    median, sigma = LENGTHS[name]
    draw = np.random.default_rng(0).lognormal(np.log(median), sigma, (1000, count))
    lengths = draw.clip(16, LONGEST).astype(int)
    fills = lengths.mean(1) / (lengths.max(1) if pad_to is None else pad_to)
    return lengths[np.abs(fills - fill).argmin()].tolist()


def documents(case: Case, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) a document; labels unshifted, -100 where there is none."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in case.lengths:
        ids = torch.randint(vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: length - min(round(length * case.labelled), length - 1)] = -100
        made.append((ids, labels))
    return made


def padded_batch(case: Case, vocabulary: int, device: str) -> dict[str, Tensor]:
    made = documents(case, vocabulary)
    shape = (len(made), case.pad_to)
    ids = torch.zeros(shape, dtype=torch.long)
    labels, mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.long)
    for row, (document, targets) in enumerate(made):
        ids[row, : len(document)], labels[row, : len(document)] = document, targets
        mask[row, : len(document)] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {key: value.to(device) for key, value in batch.items()}


def packed_batch(case: Case, vocabulary: int, device: str) -> dict[str, Tensor | int]:
    ids, labels = (torch.cat(parts) for parts in zip(*documents(case, vocabulary), strict=True))
    positions = torch.cat([torch.arange(length) for length in case.lengths])
    offsets = torch.tensor(np.cumsum([0, *case.lengths]), dtype=torch.int32)
    return {
        "input_ids": ids[None].to(device),
        "labels": labels[None].to(device),
        "position_ids": positions[None].to(device),
        "cu_seqlens": offsets.to(device),
        "max_seqlen": LONGEST,
        "num_loss_tokens": case.num_loss_tokens(),
    }


def step(model: torch.nn.Module, batch: dict, precision: str, device: str) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "amp_bf16"):
            loss = model(**batch).loss
        loss.backward()

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    """Of one step: wall time on a GPU, CPU time of all threads on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


def peak_memory(run: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(case: Case, config: LlamaConfig, options: argparse.Namespace) -> str:
    """A line of the table."""
    device, num_tokens = options.device, sum(case.lengths)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    theirs = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", torch_dtype=dtype)
    ours = SmolLM2ForCausalLM(config).to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    ours.load_state_dict(theirs.state_dict())
    ours.attention_backend, ours.loss_implementation = options.backend, options.loss
    theirs, ours = theirs.to(device).train(), ours.to(device).train()  # pyright: ignore
    runs = [
        step(theirs, padded_batch(case, config.vocab_size, device), options.precision, device),
        step(ours, packed_batch(case, config.vocab_size, device), options.precision, device),
    ]
    for run in runs:
        run()  # allocations, kernel selection
    pairs = [[seconds(run, device) for run in runs] for _ in range(options.repeats)]
    ratios = sorted(baseline / packed for baseline, packed in pairs)
    rates = [num_tokens / statistics.median(column) for column in zip(*pairs, strict=True)]
    fill = num_tokens / (len(case.lengths) * case.pad_to)
    cells = [
        f"{len(case.lengths)} padded to {case.pad_to}",
        f"{100 * fill:.0f} %",
        f"{100 * case.labelled:.0f} %",
        f"{rates[0]:,.0f}",
        f"{rates[1]:,.0f}",
        f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f})",
    ]
    if device == "cuda":
        flops = training_flops(
            config,
            num_tokens=num_tokens,
            num_loss_tokens=case.num_loss_tokens(),
            sum_squared_lengths=sum(length**2 for length in case.lengths),
        )
        peak = peak_flops(torch.cuda.get_device_name())
        mfu = "?" if peak is None else f"{100 * flops * rates[1] / num_tokens / peak:.1f} %"
        cells += [mfu, *(f"{peak_memory(run):.2f}" for run in runs)]
    return "| " + " | ".join(cells) + " |"


def machine(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        cpu = next((line for line in lines if line.startswith("model name")), platform.machine())
        name = f"{cpu.split(':')[-1].strip()}, {torch.get_num_threads()} threads"
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    backend = resolve_backend(options.backend, device=options.device, dtype=dtype)
    return (
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, transformers"
        f" {importlib.metadata.version('transformers')}; {options.model}, {options.precision};"
        f" attention {backend}, loss {options.loss}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore
    parser.add_argument("--model", default="smollm2-135m", help="a shipped shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "amp_bf16", "fp32"))
    parser.add_argument("--backend", default="auto", help="attention backend of ours")
    parser.add_argument("--loss", default="chunked", choices=("chunked", "liger"))
    parser.add_argument("--lengths", default="a", choices=sorted(LENGTHS))
    parser.add_argument("--documents", type=int, default=8, help="of a step")
    parser.add_argument("--documents-2048", type=int, default=4, help="where padded to 2048")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fill", type=float, default=0.66, help="padded to the longest")
    parser.add_argument("--fill-2048", type=float, default=0.39, help="padded to 2048")
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(CONFIGS / options.model, use_cache=False)
    name = options.lengths
    short = draw_lengths(name, options.documents, fill=options.fill, pad_to=None)
    long = draw_lengths(name, options.documents_2048, fill=options.fill_2048, pad_to=LONGEST)
    cases = [
        Case(lengths, pad_to, labelled)
        for lengths, pad_to in ((short, max(short)), (long, LONGEST))
        for labelled in (1.0, 0.5)
    ]
    unit = "s" if options.device == "cuda" else "CPU-s"
    header = ["documents", "padding's fill", "labelled", f"HF padded, tokens/{unit}"]
    header += [f"ours, tokens/{unit}", "ratio (least-most)"]
    if options.device == "cuda":
        header += ["our MFU", "HF peak GiB", "our peak GiB"]
    print(machine(options) + "\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for case in cases:
        print(measure(case, config, options), flush=True)


if __name__ == "__main__":
    main()
