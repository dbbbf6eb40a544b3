"""Logits and greedy answers from stock transformers and peft, in a process without foundry_ext.

    python stock.py REQUEST.json FOLDER

REQUEST has `models` by name (the folder `model`, and `adapter` if there is one), `texts` to give
logits of, and `prompts` that the models of the list `generate` continue. FOLDER gets the logits of
each model, [T, V] per text, as NAME.safetensors, and answers.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(given: dict[str, str]) -> tuple[Any, Any]:
    """Return the model in evaluation mode and its tokenizer, as any user loads them."""
    model: Any = AutoModelForCausalLM.from_pretrained(given["model"], trust_remote_code=False)
    if "adapter" in given:
        model = peft.PeftModel.from_pretrained(model, given["adapter"])
    folder = given.get("adapter", given["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    return model.eval(), tokenizer


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Return [T, V] logits by the text's index, each text computed alone."""
    found = {}
    for index, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        found[str(index)] = model(input_ids=ids).logits[0].float().contiguous()
    return found


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Return greedy continuations of the prompts, as one padded batch."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    tokens = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = tokens[:, batch.input_ids.shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def main(request: Path, folder: Path) -> None:
    given = json.loads(request.read_text(encoding="utf-8"))
    answers = {}
    for name, where in given["models"].items():
        model, tokenizer = load(where)
        save_file(logits_of(model, tokenizer, given["texts"]), folder / f"{name}.safetensors")
        if name in given["generate"]:
            answers[name] = answer(model, tokenizer, given["prompts"], given["max_new_tokens"])
        del model
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("foundry_ext", "composer"))
    assert not ours, ours
    packages = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    result = {"answers": answers, "packages": packages}
    (folder / "answers.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
