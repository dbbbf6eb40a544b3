"""Packed evaluation equals evaluation by logits, without them; in-context tasks get logits."""

import copy
import math

import pytest
import torch
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.eval.metrics.nlp import InContextLearningLMAccuracy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import foundry_ext.models.loss
from tests.tiers import one_of
from tests.training import kit

METRICS = ("LanguageCrossEntropy", "LanguagePerplexity", "TokenAccuracy")


def evaluate(world, folder, loader, method="full", **overrides):
    """Return the metrics after an epoch by llm-foundry's train command, and the run."""
    settings = {
        "eval_loader": loader,
        "eval_interval": "1ep",
        "max_duration": "1ep",
        "optimizer__lr": 0.03,
        "save_folder": None,
    }
    run = kit.run(kit.run_config(world, folder, method, **settings | overrides))
    return {name: run.logged(f"metrics/eval/{name}")[-1] for name in METRICS}, run


def expected(world, run):
    """Return the metrics from transformers' logits of a padded batch."""
    loader = kit.loader_config(world.eval_rows)
    spec = build_dataloader(loader, kit.load_tokenizer(world), 1)
    packs = [pack for batch in spec.dataloader for pack in batch]
    assert len(packs) >= 3 and len(kit.documents_of(packs)) == 11
    theirs = kit.stock_model(world, run.trainer.state.model).eval()
    with torch.no_grad():
        loss, count, correct = kit.their_sums(theirs, packs)
    assert 0 < correct < count
    mean = loss.item() / count
    return dict(zip(METRICS, (mean, math.exp(mean), correct / count), strict=True))


@pytest.mark.parametrize("method", one_of(["full", "dora"], "dora"))
@pytest.mark.parametrize("eval_packs", [1, 2, 3, None])
def test_metrics_are_those_of_logits(world, tmp_path, method, eval_packs):
    """Any number of packs per batch gives the same; None is device_eval_batch_size. (Trap 32.)"""
    settings = {} if eval_packs is None else {"eval_packs": eval_packs}
    loader = kit.loader_config(world.eval_rows, **settings)
    found, run = evaluate(world, tmp_path, loader, method)
    assert found == pytest.approx(expected(world, run), rel=3e-6)


def test_a_stock_padded_loader_evaluates_to_the_same(world, tmp_path):
    loader = {
        "name": "finetuning",
        "dataset": {
            "hf_name": "json",
            "hf_kwargs": {"data_files": {"train": str(world.eval_rows)}},
            "split": "train",
            "max_seq_len": 32,
            "decoder_only_format": True,
            "shuffle": False,
        },
        "num_workers": 0,
        "drop_last": False,
        "prefetch_factor": None,
        "persistent_workers": False,
    }
    metrics = ["masked_accuracy"]
    found, run = evaluate(world, tmp_path, loader, model__additional_eval_metrics=metrics)
    assert found == pytest.approx(expected(world, run), rel=3e-6)


def test_metrics_that_need_logits_are_refused(world, tmp_path):
    loader = kit.loader_config(world.eval_rows)
    with pytest.raises(ValueError, match="MaskedAccuracy needs logits"):
        evaluate(world, tmp_path, loader, model__additional_eval_metrics=["masked_accuracy"])


class MostRows(TorchDispatchMode):
    """Recorder of the most rows of any tensor as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == kit.VOCABULARY:
                self.rows = max(self.rows, x.numel() // kit.VOCABULARY)
        return out


@pytest.mark.parametrize("method", ["full", "dora"])
def test_no_logits_of_all_positions_exist(world, monkeypatch, method):
    """[T, V] would be 26 GB for 8 packs of 16k tokens and SmolLM2's vocabulary. (Trap 33.)"""
    monkeypatch.setattr(foundry_ext.models.loss, "CHUNK_ELEMENTS", 4 * kit.VOCABULARY)
    model = kit.build(world, method=method).eval()
    pack = kit.make_pack(kit.make_documents([40, 30, 50]))
    with torch.no_grad(), MostRows() as seen:
        outputs = model.eval_forward(pack)
        for metric in model.get_metrics().values():
            if type(metric).__name__ in METRICS:
                model.update_metric(pack, outputs, metric)
    transposed_head = kit.SHAPE["hidden_size"]
    assert 4 <= seen.rows <= transposed_head < pack["num_loss_tokens"]
    assert outputs.logits is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_in_context_tasks_get_the_logits_of_hf_causal_lm(world, side):
    torch.manual_seed(0)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    mask = mask if side == "right" else mask.flip(1)
    input_ids = torch.randint(1, kit.VOCABULARY, mask.shape) * mask
    batch = {
        "mode": "icl_task",
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, -100),
        "continuation_indices": [row.nonzero().squeeze(-1)[-2:] for row in mask],
    }
    ours = kit.build(world).eval()
    theirs = kit.build(world, name="hf_causal_lm", use_train_metrics=False).eval()
    logits, accuracies = [], []
    for model in (ours, theirs):
        own = copy.deepcopy(batch)
        with torch.no_grad():
            logits.append(model.eval_forward(own))
        metric = InContextLearningLMAccuracy()
        metric.update(own, logits[-1], model.labels)
        accuracies.append(metric.compute())
    real = mask.bool()
    torch.testing.assert_close(logits[0][real], logits[1][real], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.labels, theirs.labels)
    assert accuracies[0] == accuracies[1]
