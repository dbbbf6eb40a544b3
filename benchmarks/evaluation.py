"""Real tokens per second of evaluations, before and after what is computed once, and Hugging Face.

    python benchmarks/evaluation.py                                # random weights, random rows
    python benchmarks/evaluation.py --model FOLDER --data FOLDER   # real weights, real rows

`--model` is a Hugging Face folder of weights and tokenizer, `--data` has the files that
benchmarks/evaluation_cases.py names. Tokens are those of all documents, each counted whole; in
generation, prompts and new tokens.

- Multiple choice: every choice a packed document of its own (before), what a question's choices
  have in common laid out once (after), transformers' Llama on one choice at a time.
- KL of held-out documents: base and tuned model computed (before, and at every first evaluation),
  the base model's states kept from an earlier evaluation (after), transformers one by one.
- Generation: a left-padded batch and transformers' `generate` on our model (before), models/greedy
  (after), the same `generate` on transformers' Llama.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from benchmarks.evaluation_cases import MOST_NEW_TOKENS, POSITIONS, Case, random_cases, real_cases
from benchmarks.machine import as_line
from benchmarks.measure import alternate, pairwise
from benchmarks.report import default_device, new_report, ratio, write_json
from benchmarks.variants import CONFIGS, share_parameters
from foundry_ext.evaluation.scoring import Shard, score_documents
from foundry_ext.evaluation.trees import plant, score_forest
from foundry_ext.models.greedy import generate_greedily
from foundry_ext.models.padding import pad_left
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.collator import PackCollator

PACK_TOKENS = 8192
BEFORE, AFTER, HF = "before", "after", "transformers"
Result = Any  # of a variant: a float per document, or tokens per prompt


class Models:
    """Our model and transformers' with the same weights, and a base that differs a little."""

    def __init__(self, config: LlamaConfig, folder: str | None, device: str):
        self.config = config
        torch.manual_seed(0)
        made = LlamaForCausalLM.from_pretrained(folder) if folder else LlamaForCausalLM(config)
        self.theirs = made.float().eval().to(device)  # pyright: ignore
        self.ours = self._packed(self.theirs)
        self.their_base = copy.deepcopy(self.theirs)
        with torch.no_grad():
            for weight in self.their_base.parameters():
                weight *= 1 + 0.02 * torch.randn_like(weight)
        self.our_base = self._packed(self.their_base)

    def _packed(self, theirs: LlamaForCausalLM) -> SmolLM2ForCausalLM:
        with torch.device("meta"):
            ours = SmolLM2ForCausalLM(self.config)
        share_parameters(theirs, ours)
        return ours.eval()


def separate(
    model: SmolLM2ForCausalLM, case: Case, base: BaseStates | None
) -> list[tuple[float, float]]:
    """Return (log-probability, KL) of each document, all of them packed whole."""
    documents = case.documents
    lengths = np.array([len(document.input_ids) for document in documents])
    collator = PackCollator(max_seq_len=POSITIONS + 1, pack_tokens=PACK_TOKENS)
    scores = score_documents(
        model,
        np.arange(len(documents)),
        lengths,
        lambda indices: collator([documents[index] for index in indices]),
        name="documents",
        capacity=PACK_TOKENS,
        base=base,
        shard=Shard(),
    )
    return [(one.log_prob, one.kl or 0.0) for one in sorted(scores)]


def shared(model: SmolLM2ForCausalLM, case: Case) -> list[float]:
    """Return the log-probability of each document; those of a group share their prefix."""
    documents = case.documents
    ends = np.cumsum([0, *map(len, case.groups)]).tolist()
    groups = [range(*ends[index : index + 2]) for index in range(len(case.groups))]
    forest = plant(groups, documents, PACK_TOKENS)
    scores = score_forest(model, documents, forest, name="documents", shard=Shard())
    return [log_prob for _, log_prob in sorted(scores)]


@torch.no_grad()
def one_by_one(
    model: LlamaForCausalLM, case: Case, base: LlamaForCausalLM | None
) -> list[tuple[float, float]]:
    """Return (log-probability, KL) of each document; transformers computes needed logits only."""
    found = []
    for document in case.documents:
        ids = torch.from_numpy(document.input_ids).to(model.device)
        scored = torch.from_numpy(np.flatnonzero(document.loss_mask)).to(model.device)
        keep = len(ids) - int(scored[0])

        def log_probs(which: LlamaForCausalLM, ids=ids, scored=scored, keep=keep) -> Tensor:
            logits = which(ids[None, :-1], use_cache=False, logits_to_keep=keep).logits[0]
            return logits[scored - scored[0]].float().log_softmax(-1)

        now, kl = log_probs(model), 0.0
        if base is not None:
            before = log_probs(base)
            kl = F.kl_div(now, before, reduction="sum", log_target=True).item()
        found.append((now.gather(1, ids[scored, None]).double().sum().item(), kl))
    return found


class _Ends(StoppingCriteria):
    def __init__(self, case: Case, num_prompt: int):
        self.case, self.num_prompt = case, num_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore
        rows = input_ids[:, self.num_prompt :].tolist()
        return torch.tensor([self.case.has_ended(row) for row in rows], device=input_ids.device)


@torch.no_grad()
def padded(model: Any, case: Case) -> list[list[int]]:
    """Return what transformers' `generate` adds to the prompts, in one left-padded batch."""
    ids, mask = pad_left(case.prompts, 0)
    width = ids.shape[1]
    generated = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=MOST_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([_Ends(case, width)]),
    )
    return [_until_end(row, case) for row in generated[:, width:].tolist()]


def _until_end(row: Sequence[int], case: Case) -> list[int]:
    ends = (end for end in range(1, len(row)) if case.has_ended(row[:end]))
    return list(row[: next(ends, len(row))])


def variants(models: Models, case: Case) -> dict[str, Callable[[], Result]]:
    """Return the ways to compute a case, by name."""
    ours, theirs = models.ours, models.theirs
    if case.prompts:
        return {
            BEFORE: lambda: padded(ours, case),
            AFTER: lambda: generate_greedily(
                ours, case.prompts, max_new_tokens=MOST_NEW_TOKENS, has_ended=case.has_ended
            ),
            HF: lambda: padded(theirs, case),
        }
    if case.name.startswith("KL"):
        base = lambda: nullcontext(models.our_base)  # noqa: E731
        kept = BaseStates(base)
        separate(ours, case, kept)  # the run's first evaluation
        return {
            BEFORE: lambda: [kl for _, kl in separate(ours, case, BaseStates(base))],
            AFTER: lambda: [kl for _, kl in separate(ours, case, kept)],
            HF: lambda: [kl for _, kl in one_by_one(theirs, case, models.their_base)],
        }
    return {
        BEFORE: lambda: [log_prob for log_prob, _ in separate(ours, case, None)],
        AFTER: lambda: shared(ours, case),
        HF: lambda: [log_prob for log_prob, _ in one_by_one(theirs, case, None)],
    }


def measure(models: Models, case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Return tokens/s of each variant, ratios over the one before, and differences from HF."""
    results: dict[str, Result] = {}
    runs = variants(models, case)
    timed = {
        name: lambda name=name, run=run: results.__setitem__(name, run())
        for name, run in runs.items()
    }
    seconds = alternate(timed, device, repeats=repeats)
    tokens = case.num_tokens
    if case.prompts:
        tokens += sum(map(len, results[AFTER]))
    return {
        "case": case.name,
        "documents": len(case.documents) or len(case.prompts),
        "tokens": tokens,
        "tokens_per_second": {name: tokens / min(values) for name, values in seconds.items()},
        "over_before": pairwise(seconds[BEFORE], seconds[AFTER]),
        "over_hf": pairwise(seconds[HF], seconds[AFTER]),
        "agreement": {name: agreement(results[name], results[HF]) for name in (BEFORE, AFTER)},
    }


def agreement(ours: Result, theirs: Result) -> dict[str, float]:
    """Return how far sums are from transformers', or how many continuations are other ones."""
    if isinstance(theirs[0], list):
        return {"other": sum(a != b for a, b in zip(ours, theirs, strict=True))}
    a, b = torch.tensor(ours).double(), torch.tensor(theirs).double()
    return {
        "absolute": float((a - b).abs().max()),
        "relative": float(((a - b).abs() / b.abs()).max()),
    }


def as_table(results: Sequence[dict[str, Any]], unit: str) -> str:
    names = (BEFORE, AFTER, HF)
    head = [*("case", "documents", "tokens"), *(f"{name}, tokens/{unit}" for name in names)]
    head += ["after over before", "after over transformers", "difference from transformers"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in results:
        found = one["agreement"][AFTER]
        cells = [one["case"], f"{one['documents']}", f"{one['tokens']:,}"]
        cells += [f"{one['tokens_per_second'][name]:,.0f}" for name in names]
        cells += [ratio(one["over_before"]), ratio(one["over_hf"])]
        cells.append(
            f"{found['other']} of {one['documents']}"
            if "other" in found
            else f"{found['absolute']:.1e} nats, {found['relative']:.1e} relative"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a Hugging Face folder; by default random weights of --shape")
    add("--shape", default="smollm2-135m", choices=sorted(path.name for path in CONFIGS.iterdir()))
    add("--data", type=Path, help="a folder with real rows; needs --model for its tokenizer")
    add("--items", type=int, default=32, help="questions; other cases have their share of it")
    add("--only", default="", help="part of the names of the cases to measure")
    add("--device", default=default_device(), choices=("cpu", "cuda"))
    add("--repeats", type=int, default=2)
    add("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.data and not options.model:
        parser.error("--data: real rows need a tokenizer; name the folder of a model by --model")
    config = LlamaConfig.from_pretrained(options.model or CONFIGS / options.shape)
    assert isinstance(config, LlamaConfig)
    models = Models(config, options.model, options.device)
    if options.data:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        cases = real_cases(options.data, tokenizer, options.items)
    else:
        cases = random_cases(config.vocab_size, options.items)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    report = new_report(options.device, settings)
    print(as_line(report["machine"]), flush=True)
    for case in cases:
        if options.only in case.name:
            result = measure(models, case, options.device, options.repeats)
            report["results"].append(result)
            print(result, file=sys.stderr, flush=True)
            if options.json:
                write_json(report, options.json)
    print(as_table(report["results"], "s" if options.device == "cuda" else "CPU-s"))


if __name__ == "__main__":
    main()
