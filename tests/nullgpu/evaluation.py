"""Count an evaluation's work on the null GPU: choices apart and as trees, generation's steps, and
packs with and without fused kernels.

python -m tests.nullgpu.evaluation LAYERS
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.evaluation_cases import random_cases
from benchmarks.variants import CONFIGS
from foundry_ext.evaluation.trees import lay_out
from foundry_ext.models.compiled import fuse_evaluation, graphs_compiled
from foundry_ext.models.greedy import generate_greedily
from foundry_ext.models.shared_prefix import score_trees
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from tests.nullgpu.counters import counting
from tests.nullgpu.kit import give

ITEMS = 24
NEW_TOKENS = (3, 13)


def count(work: Callable[[], object]) -> dict[str, Any]:
    """Return the counts of work that was done once before."""
    work()
    with counting() as counts:
        work()
    flash = sum(n for name, n in counts.kernels.items() if "flash_fwd" in name)
    return {
        "operations": counts.operations,
        "waits": sum(counts.waits.values()),
        "places": counts.waits,
        "gemm_flops": counts.gemm_flops,
        "flash": flash,
    }


def main() -> None:
    config = LlamaConfig.from_pretrained(CONFIGS / "smollm2-135m")
    config.num_hidden_layers = int(sys.argv[1])
    with torch.device("cuda"):
        model = SmolLM2ForCausalLM(config).eval()  # pyright: ignore
    results: dict[str, Any] = {}
    cases = {case.name: case for case in random_cases(config.vocab_size, ITEMS)}
    with torch.autocast("cuda", torch.bfloat16):
        for name in ("ARC, 0 shots", "ARC, 5 shots", "WinoGrande, 0 shots"):
            groups = cases[name].groups
            for kind, trees in (
                ("apart", [[document] for group in groups for document in group]),
                ("shared", groups),
            ):
                pack = lay_out(trees)
                found = count(lambda pack=pack: score_trees(model, pack.to(model.device)))
                results[f"{name}: {kind}"] = {**found, "tokens": len(pack.input_ids)}
        fuse_evaluation(model)
        for name in ("ARC, 0 shots", "ARC, 5 shots"):
            pack = lay_out(cases[name].groups)
            found = count(lambda pack=pack: score_trees(model, pack.to(model.device)))
            results[f"{name}: fused"] = {**found, "graphs": graphs_compiled()}
        fuse_evaluation(model, False)
        prompts = cases["GSM8K, 5 shots, generation"].prompts[:4]
        for new in NEW_TOKENS:
            results[f"generation: {new}"] = count(
                lambda new=new: generate_greedily(
                    model, prompts, max_new_tokens=new, has_ended=lambda _: False
                )
            )
    give(results)


if __name__ == "__main__":
    main()
