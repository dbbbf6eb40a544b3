"""Check of a run's exported model in stock libraries, with answers before and after training.

    python experiments/smollm2-135m-gsm8k/export.py outputs/smollm2-135m-gsm8k/runs/RUN ...

For every RUN it exports the newest checkpoint and compares the weights with the run's own export,
RUN/hf; merges an adapter, with its certificate; and lets stock.py load everything without
foundry_ext. results/export/RUN gets comparison.json (logits against our packed model's),
answers.json and answers.md (ten prompts, base and tuned), the merge's certificate and the card.
"""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from foundry_ext.adapters.fast import use_fast_linears
from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.checkpoints.loading import CERTIFICATE, is_adapter, load_tokenizer, load_tuned
from foundry_ext.checkpoints.merge import TEXT, compare_logits, merge_adapter
from foundry_ext.checkpoints.model_card import CARD, weights_in, write_card
from foundry_ext.checkpoints.provenance import provenance_of
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.records.record import read_record
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.environment import device_name
from foundry_ext.utils.output import redact_output

HERE = Path("experiments/smollm2-135m-gsm8k")
PROMPTS = HERE / "export_prompts.json"
RESULTS = HERE / "results" / "export"
MAX_NEW_TOKENS = 120
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="export.py")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        with tempfile.TemporaryDirectory() as scratch:
            check_run(run, arguments.out / run.name, Path(scratch))
    return 0


def check_run(run: Path, out: Path, scratch: Path) -> None:
    """Write the results of one run into `out`; large files stay in `scratch`."""
    record, own = read_record(run / "record.json"), run / "hf"
    base = record["model"]["name"]
    checkpoint = run / "checkpoints/latest-rank0.pt"
    exported = export_checkpoint(checkpoint, scratch / "exported")
    # The card of RUN/hf, not of the folder in scratch.
    weights = weights_in(exported, place=own)
    write_card(scratch, weights, provenance_of(checkpoint))
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(scratch / CARD, out / "card.md")
    models = {"base": {"model": base}, "full": {"model": str(exported)}}
    tuned = "full"
    if is_adapter(own):
        merge_adapter(own, scratch / "merged")
        shutil.copyfile(scratch / "merged" / CERTIFICATE, out / CERTIFICATE)
        del models["full"]
        models["adapter"] = {"model": base, "adapter": str(exported)}
        models["merged"] = {"model": str(scratch / "merged")}
        tuned = "merged"
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(own, base)
    rendered = [render(tokenizer, prompt) for prompt in prompts]
    texts = [*rendered, TEXT]
    request = {"models": models, "texts": texts, "prompts": rendered}
    request |= {"generate": ["base", tuned], "max_new_tokens": MAX_NEW_TOKENS}
    write_text(scratch / "request.json", json.dumps(request))
    command = [sys.executable, str(HERE / "stock.py"), str(scratch / "request.json"), str(scratch)]
    subprocess.run(command, check=True)
    found = json.loads((scratch / "answers.json").read_text(encoding="utf-8"))
    comparison = {
        "run": record["run_name"],
        "method": record["method"],
        "steps": record["steps"],
        "machine": device_name("cpu"),
        "stock": found["packages"],
        "checkpoint_equals_hf_export": same_weights(exported, own),
        **compare_with_ours(own, base, tokenizer, texts, scratch, list(models)),
    }
    write_text(out / "comparison.json", json.dumps(comparison, indent=1) + "\n")
    answers = [
        {**prompt, "before": before.strip(), "after": after.strip()}
        for prompt, before, after in zip(
            prompts, found["answers"]["base"], found["answers"][tuned], strict=True
        )
    ]
    write_text(out / "answers.json", json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "answers.md", as_markdown(record["run_name"], answers))
    print(json.dumps(comparison["logits_against_ours"], indent=1), flush=True)


def render(tokenizer: Any, prompt: dict[str, str]) -> str:
    """Return a question as GSM8K's rows are trained, or a chat as the base model was."""
    if prompt["kind"] == "question":
        return f"Question: {prompt['text']}\nAnswer:"
    chat = [{"role": "user", "content": prompt["text"]}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two exports have equal weights, to the last bit."""
    name = "adapter_model.safetensors" if is_adapter(one) else "model.safetensors"
    ours, theirs = load_file(one / name), load_file(other / name)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@torch.no_grad()
def compare_with_ours(
    own: Path, base: str, tokenizer: Any, texts: list[str], scratch: Path, names: list[str]
) -> dict[str, Any]:
    """Compare stock logits, text by text, with those of our model on one pack of all texts."""
    model = load_tuned(own, base, SmolLM2ForCausalLM)
    use_fast_linears(model)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
    packed: Any = model(
        input_ids=torch.tensor([list(itertools.chain(*ids))]),
        position_ids=torch.cat([torch.arange(len(x)) for x in ids])[None],
        cu_seqlens=ends.int(),
        max_seqlen=max(map(len, ids)),
    )
    ours = [packed.logits[0, a:b].float() for a, b in itertools.pairwise(ends.tolist())]
    found = {}
    for name in names:
        theirs = load_file(scratch / f"{name}.safetensors")
        found[name] = asdict(compare_logits(ours, [theirs[str(i)] for i in range(len(texts))]))
    return {"texts": len(texts), "tokens": int(ends[-1]), "logits_against_ours": found}


def as_markdown(name: str, answers: list[dict[str, str]]) -> str:
    """Return the answers as indented blocks, in which nothing is markup."""
    parts = [f"# Greedy answers before and after: {name}"]
    for number, entry in enumerate(answers, 1):
        parts.append(f"## {number}. {entry['kind']}: {entry['text']}")
        for when in ("before", "after"):
            verdict = ""
            if "answer" in entry:
                numbers = _NUMBER.findall(entry[when])
                last = numbers[-1].replace(",", "") if numbers else "none"
                verdict = f" (last number {last}; right is {entry['answer']})"
            text = "\n".join(f"    {line}" for line in (entry[when] or "(nothing)").splitlines())
            parts += [f"{when.capitalize()}{verdict}:", text]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    redact_output()
    sys.exit(main())
