"""Rank, intruders and the line, against planted values."""

import json
from contextlib import nullcontext

import pytest
import torch
from composer import Trainer
from transformers import LlamaForCausalLM

from foundry_ext.analysis.interpolation import ALPHAS, measure_line
from foundry_ext.analysis.weights import (
    adapter_changes,
    analyse_matrices,
    analyse_weights,
    count_intruders,
    default_output,
    rank_for_energy,
    singular_values_of_product,
)
from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.checkpoints.loading import load_model
from foundry_ext.checkpoints.merge import merge_adapter
from foundry_ext.cli.main import main
from foundry_ext.evaluation.config import parse_sets
from foundry_ext.evaluation.measure import build_sets, measure
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.records.record import new_record, write_record
from tests.training import kit

OUT, IN = 48, 32
NO_DATA = {"documents": 0, "tokens": 0, "counts": {}}


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


@pytest.fixture(scope="module")
def weight():
    """Make a weight with singular values 32, 31, ..., 1 in known directions U and V."""
    U, V = orthonormal(OUT, IN, 0), orthonormal(IN, IN, 1)
    values = torch.arange(IN, 0, -1).float()
    return U, values, V, U @ values.diag() @ V.T


# --- rank ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_a_planted_rank_is_found(k):
    """With k equal singular values, k - 1 of them (at most 8 of 9) hold less than 90 %."""
    change = 0.7 * orthonormal(OUT, k, 2) @ orthonormal(IN, k, 3).T
    assert rank_for_energy(torch.linalg.svdvals(change)) == k


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3.0, 1.0], 1),  # 9 of 10
        ([2.9, 1.0], 2),
        ([1.0] * 10, 9),  # exactly 90 %
        ([1.0] * 11, 10),
        ([1.0, 3.0], 1),  # in any order
        ([0.0, 0.0], 0),
    ],
)
def test_the_share_is_of_squares(values, rank):
    assert rank_for_energy(torch.tensor(values)) == rank


def test_factors_give_the_singular_values_of_their_product():
    generator = torch.Generator().manual_seed(4)
    B, A = (torch.randn(*shape, generator=generator) for shape in ((OUT, 5), (5, IN)))
    dense = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(singular_values_of_product(B, A), dense[:5], rtol=1e-5, atol=1e-5)


# --- intruders -----------------------------------------------------------------------------------


def mixed(directions):
    """Return a unit vector at the same small angle to all of these: cosine 1/sqrt(32) = 0.18."""
    return directions.mean(1) * directions.shape[1] ** 0.5


@pytest.mark.parametrize("planted", ["outside", "between"])
def test_a_planted_direction_is_one_intruder(weight, planted):
    """The new leading direction is orthogonal to all of W's, or in their span but unlike each."""
    U, _, V, W = weight
    new = torch.linalg.qr(torch.cat([U, orthonormal(OUT, 1, 5)], 1)).Q[:, -1]
    new = new if planted == "outside" else mixed(U)
    assert (U.T @ new).abs().max() < 0.2
    assert count_intruders(W, W + 200 * new[:, None] * mixed(V), k=3) == 1
    assert count_intruders(W, W + 0.01 * new[:, None] * mixed(V), k=3) == 0  # it does not lead


def test_stronger_directions_of_the_base_are_no_intruders(weight):
    U, values, V, W = weight
    assert count_intruders(W, W) == 0
    assert count_intruders(W, -W) == 0  # signs mean nothing
    assert count_intruders(W, U @ (values * 3).diag() @ V.T) == 0
    values = values.clone()
    values[-1] = 100  # the last becomes the first
    assert count_intruders(W, U @ values.diag() @ V.T) == 0


def test_k_and_epsilon_mean_what_they_say(weight):
    U, _, V, W = weight
    tuned = W + 200 * (0.8 * U[:, 0] + 0.6 * mixed(U))[:, None] * mixed(V)
    assert count_intruders(W, tuned, k=1, epsilon=0.5) == 0
    assert count_intruders(W, tuned, k=1, epsilon=0.99) == 1
    rotated = orthonormal(OUT, IN, 7) @ torch.arange(IN, 0, -1).float().diag() @ V.T
    assert count_intruders(W, rotated, k=4, epsilon=0.99) == 4


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    world = kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)
    kit.load_tokenizer(world).save_pretrained(world.base)
    return world


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Return saved(method): a Composer checkpoint of an adapter that has an effect."""
    made = {}

    def get(method):
        if method not in made:
            model = kit.build(world, method=method)
            kit.randomise_adapter(model)
            made[method] = tmp_path_factory.mktemp(method) / "model.pt"
            Trainer(model=model, device="cpu", precision="fp32").save_checkpoint(str(made[method]))
        return made[method]

    return get


@pytest.fixture
def sets(world):
    loader = kit.loader_config(world.eval_rows, eval_packs=1)
    documents = {"type": "documents", "loader": loader}
    return {
        "target": {"role": "learning", **documents},
        "source": {"role": "forgetting", "kl": True, "max_documents": 5, **documents},
    }


def test_identical_weights_have_no_change(world):
    analysis = analyse_weights(world.base, base=str(world.base))
    assert len(analysis["matrices"]) == 14
    for matrix in analysis["matrices"]:
        assert (matrix["rank_90"], matrix["intruders"], matrix["norm_change"]) == (0, 0, 0)
    assert analysis["summary"]["total_intruders"] == analysis["summary"]["median_rank_90"] == 0


def test_a_change_planted_in_one_matrix(world, tmp_path):
    model = LlamaForCausalLM.from_pretrained(world.base)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight += 0.1 * orthonormal(48, 3, 8) @ orthonormal(32, 3, 9).T
    model.save_pretrained(tmp_path)
    analysis = analyse_weights(tmp_path, base=str(world.base))
    changed = [matrix for matrix in analysis["matrices"] if matrix["norm_change"] > 0]
    assert [matrix["name"] for matrix in changed] == ["model.layers.1.mlp.up_proj"]
    assert changed[0]["rank_90"] == 3 and changed[0]["shape"] == (48, 32)
    assert changed[0]["norm_change"] == pytest.approx(0.1 * 3**0.5, rel=1e-4)
    assert changed[0]["singular_values"][:3] == pytest.approx([0.1] * 3, rel=1e-3)
    by_module, by_layer = (analysis["summary"][key] for key in ("by_module", "by_layer"))
    assert by_module["up_proj"]["relative_change"] > 0 == by_module["q_proj"]["relative_change"]
    assert by_layer["1"]["relative_change"] > 0 == by_layer["0"]["relative_change"]


@pytest.mark.parametrize("method", kit.ADAPTERS)
def test_an_adapter_is_analysed_as_its_merged_model(world, saved, tmp_path, method):
    """The adapter's factors give the same figures as the merged model's dense weights."""
    merge_adapter(saved(method), tmp_path / "merged")
    ours, dense = (
        analyse_weights(saved(method)),
        analyse_weights(tmp_path / "merged", base=str(world.base)),
    )
    assert ours["base"] == str(world.base)
    for one, other in zip(ours["matrices"], dense["matrices"], strict=True):
        assert (one["name"], one["shape"]) == (other["name"], other["shape"])
        assert one["rank_90"] == other["rank_90"] and one["intruders"] == other["intruders"]
        assert one["norm_change"] == pytest.approx(other["norm_change"], rel=1e-4)
        # An adapter of rank 4 changes a weight by rank 4; DoRA's magnitudes by more.
        assert (len(one["singular_values"]) == kit.LORA["r"]) == (method != "dora")
    assert ours["summary"]["median_rank_90"] > 1


def test_lora_adapters_need_no_dense_change(world, saved, tmp_path, monkeypatch):
    export_checkpoint(saved("rslora"), tmp_path / "hf")
    from foundry_ext.checkpoints.loading import load_tuned

    model = load_tuned(tmp_path / "hf", str(world.base), SmolLM2ForCausalLM)
    changes = list(adapter_changes(model))
    for change in changes:
        dense = torch.linalg.svdvals(change.after - change.before)[: kit.LORA["r"]]
        torch.testing.assert_close(change.values, dense, rtol=1e-4, atol=1e-5)
    decomposed = []
    monkeypatch.setattr("foundry_ext.analysis.weights.count_intruders", lambda *_: 0)
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: decomposed.append(x) or svdvals(x))
    analyse_matrices(iter(changes))
    assert not decomposed


# --- the line ------------------------------------------------------------------------------------


def test_the_line_s_ends_are_base_and_tuned(world, saved, sets, tmp_path):
    merge_adapter(saved("dora"), tmp_path / "merged")
    base, tuned = (
        load_model(str(f), SmolLM2ForCausalLM) for f in (world.base, tmp_path / "merged")
    )
    built = build_sets(parse_sets(sets), kit.load_tokenizer(world), 128)
    expected = [measure(built, m, BaseStates(lambda: nullcontext(base)))[0] for m in (base, tuned)]
    alphas = (*ALPHAS, 1.25)
    line = measure_line(base, tuned, parse_sets(sets), tmp_path / "merged", str(world.base), alphas)
    assert [point["alpha"] for point in line] == list(alphas)
    by_alpha = {point["alpha"]: point for point in line}
    assert by_alpha[0]["metrics"] == expected[0]
    assert by_alpha[1]["metrics"] == expected[1]  # bit for bit
    assert by_alpha[0]["metrics"]["source/kl"] == 0
    assert by_alpha[0]["learning"]["target_loss"] == by_alpha[0]["forgetting"]["source_loss"] == 0
    kl = [point["metrics"]["source/kl"] for point in line]
    assert kl == sorted(kl) and kl[1] > 0
    for point in line:
        moved = expected[0]["target/loss"] - point["metrics"]["target/loss"]
        assert point["learning"]["target_loss"] == pytest.approx(moved)
    weights = dict(tuned.named_parameters())
    end = dict(load_model(str(tmp_path / "merged"), SmolLM2ForCausalLM).named_parameters())
    for name, start in load_model(str(world.base), SmolLM2ForCausalLM).named_parameters():
        expected = start + 1.25 * (end[name] - start)
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-6)


# --- files ---------------------------------------------------------------------------------------


def test_the_analysis_lies_beside_the_run_s_record(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "hf").mkdir()
    assert default_output(run / "hf") == run / "analysis.json"
    (run / "record.json").touch()
    for model in (run / "hf", run / "checkpoints" / "latest.pt", run):
        assert default_output(model) == run / "analysis.json"


def test_the_base_of_a_full_model_stands_in_its_run_s_record(world, tmp_path):
    merged = LlamaForCausalLM.from_pretrained(world.base)
    merged.save_pretrained(tmp_path / "hf")
    model = {"pretrained_model_name_or_path": str(world.base)}
    record = new_record(
        run_name="x",
        experiment="x",
        method="full",
        seed=1,
        learning_rate=0.1,
        config={"model": model},
        environment={
            **{"python": "3.11", "packages": {}, "commit": None, "dirty": None},
            **{"device": "cpu", "device_kind": "cpu", "world_size": 1},
        },
        data={"train": dict.fromkeys(("name", "revision", "fingerprint")) | NO_DATA, "eval": {}},
        model={
            **{"name": "x", "parameters": 1, "trainable_parameters": 1},
            **dict.fromkeys(("rank", "alpha", "effective_scale", "target_modules", "init")),
        },
    )
    write_record(tmp_path / "record.json", record)
    assert main(["analyse", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "analysis.json").read_text())["base"] == str(world.base)
    record["config"]["model"]["pretrained"] = False  # random weights: there is nothing to compare
    write_record(tmp_path / "record.json", record)
    assert main(["analyse", str(tmp_path / "hf")]) == 2


def test_the_command(world, saved, sets, tmp_path, capsys):
    (tmp_path / "sets.yaml").write_text(json.dumps({"sets": sets}))
    out = tmp_path / "deep" / "analysis.json"
    command = ["analyse", str(saved("lora")), "--sets", str(tmp_path / "sets.yaml")]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "14 matrices" in printed and "alpha 1: learning target_loss" in printed
    analysis = json.loads(out.read_text())
    assert analysis["schema_version"] == 1
    assert analysis.keys() == {"schema_version", "model", "base", "matrices", "summary", "line"}
    assert analysis["summary"].keys() >= {"median_rank_90", "total_intruders", "k", "epsilon"}
    assert len(analysis["line"]) == len(ALPHAS)
    assert not list(tmp_path.rglob("*.partial"))


def test_refused(world, tmp_path):
    with pytest.raises(ValueError, match="does not name its base model; pass --base"):
        analyse_weights(world.base)
    kit.make_llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="other weights or shapes; pass the right one by --base"):
        analyse_weights(world.base, base=str(tmp_path / "short"))
    with pytest.raises(FileNotFoundError):
        analyse_weights(tmp_path / "nowhere.pt")
