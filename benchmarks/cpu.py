"""The CPU path on this processor: training at 42 % fill and evaluation, against Hugging Face's.

    python benchmarks/cpu.py                        # bf16 and fp32
    python benchmarks/cpu.py --precision bf16 --rounds 3 --json F

Training is a complete optimizer step of SmolLM2-135M on documents that fill padded rows to 42 %:
ours packed, against transformers' padded SDPA with its mask, without it, and one document a
microbatch without it, which pads nothing. Evaluation is the forward pass with loss: ours packed,
transformers' one document at a time. Ours and theirs have a process each, because ours sets the
allocator (foundry_ext/utils/allocator.py), and take turns. Time is CPU time of the process.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from benchmarks.machine import as_line
from benchmarks.measure import pairwise, spread
from benchmarks.report import new_report, write_json
from benchmarks.variants import Bench, Setup, Step
from benchmarks.workloads import Workload, draw_lengths, make_documents
from foundry_ext.models.attention import resolve_backend
from foundry_ext.utils.allocator import keep_freed_memory

FILL = 0.42
OURS, THEIRS = "ours", "theirs"
# (title, run of ours, run of theirs, aim)
COMPARED = (
    ("training, over HF padded SDPA", "ours_eager", "hf_padded", 3.5),
    ("training, over HF padded SDPA without a mask", "ours_eager", "hf_padded_no_mask", None),
    ("training, over HF one document a microbatch", "ours_eager", "hf_one_a_microbatch", 1.6),
    ("evaluation, over HF one document at a time", "evaluation", "one_by_one", 1.0),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def workload(count: int, vocabulary: int) -> Workload:
    """Return `count` documents whose padded batch is 42 % full, as one microbatch and one pack."""
    lengths = draw_lengths("a", count, fill=FILL, pad_to=None)
    return Workload(
        name=f"{count} documents, fill {FILL}",
        documents=make_documents(lengths, vocabulary=vocabulary, labelled=1.0),
        pack_tokens=sum(lengths),
        microbatches=(count,),
    )


def evaluate(step: Step) -> float:
    """Return mean nats over the labels of all batches, without gradients."""
    step.model.eval()
    with torch.inference_mode():
        losses = [float(step.model(**batch).loss) for batch in step.batches]
    step.model.train()
    sums = [loss * weight for loss, weight in zip(losses, step.weights, strict=True)]
    return sum(sums) / step.num_loss_tokens


def runs_of(side: str, setup: Setup, documents: Workload) -> dict[str, Callable[[], float]]:
    bench = Bench(setup)

    def train(name: str, rows: int | None = None) -> Callable[[], float]:
        step = bench.step(name, documents, rows)
        return lambda: step().item()

    if side == OURS:
        packed = bench.step("ours_eager", documents)
        return {"ours_eager": train("ours_eager"), "evaluation": lambda: evaluate(packed)}
    single = bench.step("hf_padded_no_mask", documents, 1)  # a row each, so nothing is padded
    return {
        "hf_padded": train("hf_padded"),
        "hf_padded_no_mask": train("hf_padded_no_mask"),
        "hf_one_a_microbatch": train("hf_padded_no_mask", 1),
        "one_by_one": lambda: evaluate(single),
    }


def serve(connection: Connection, side: str, setup: Setup, documents: Workload) -> None:
    """Answer each name of a run with (CPU seconds, loss), until None comes."""
    if side == OURS:
        keep_freed_memory()
    runs = runs_of(side, setup, documents)
    while (name := connection.recv()) is not None:
        start = time.process_time()
        loss = runs[name]()
        connection.send((time.process_time() - start, loss))


@contextmanager
def process(side: str, setup: Setup, documents: Workload):
    """Yield a function from a run's name to (CPU seconds, loss), computed in a process."""
    context = get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=serve, args=(there, side, setup, documents), daemon=True)
    child.start()
    there.close()

    def ask(name: str) -> tuple[float, float]:
        here.send(name)
        return here.recv()

    yield ask
    here.send(None)
    child.join()


def compare(setup: Setup, documents: Workload, rounds: int) -> dict[str, Any]:
    """Return {"seconds", "losses", "ratios"}; the first of each run warms up."""
    sides = {ours: OURS for _, ours, _, _ in COMPARED}
    sides |= {theirs: THEIRS for _, _, theirs, _ in COMPARED}
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    with ExitStack() as stack:
        asks = {s: stack.enter_context(process(s, setup, documents)) for s in (OURS, THEIRS)}
        for number in range(1 + rounds):
            for name, side in sides.items():
                taken, losses[name] = asks[side](name)
                times[name] += [taken] if number else []
                print(f"  {name}: {taken:.2f} CPU-s, loss {losses[name]:.5f}", file=sys.stderr)
    ratios = {title: pairwise(times[theirs], times[ours]) for title, ours, theirs, _ in COMPARED}
    return {"seconds": times, "losses": losses, "ratios": ratios}


def show(precision: str, found: Mapping[str, Any], num_tokens: int) -> None:
    rates = {name: num_tokens / spread(x)["median"] for name, x in found["seconds"].items()}
    for title, ours, theirs, aim in COMPARED:
        ratio, wanted = found["ratios"][title], aim or "-"
        print(
            f"| {precision} | {title} | {rates[theirs]:.0f} | {rates[ours]:.0f} |"
            f" **{ratio['median']:.2f}** ({ratio['least']:.2f}-{ratio['most']:.2f}) | {wanted} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="bf16,fp32", help=",".join(DTYPES))
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    report = new_report("cpu", {"documents": options.documents, "rounds": options.rounds})
    print(as_line(report["machine"]))
    for number, precision in enumerate(options.precision.split(",")):
        setup = Setup(precision=precision)
        documents = workload(options.documents, setup.config().vocab_size)
        chosen = resolve_backend("auto", device="cpu", dtype=DTYPES[precision])
        print(f"{precision}: {documents.name}, {documents.num_tokens} tokens; auto is {chosen}")
        found = compare(setup, documents, options.rounds)
        report["results"].append({"precision": precision, "attention": chosen, **found})
        if number == 0:
            print("| | | HF, real tokens/CPU-s | ours | ratio (least-most) | aim |")
            print("|---|---|---|---|---|---|")
        show(precision, found, documents.num_tokens)
        if options.json:
            write_json(report, options.json)


if __name__ == "__main__":
    main()
