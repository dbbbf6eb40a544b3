"""Complete runs on 2 and 4 ranks, with DDP and FSDP2, against one rank; odd amounts of data.

Every global batch is the same, and therefore so are losses, gradients and weights, to rounding.
FSDP2 on a CPU needs FSDP_VERSION=2. (Traps 18, 32, 39.)
"""

import json
from collections import Counter
from itertools import chain

import pytest
import torch

from tests.system.ranks import ADDS_UP, launch
from tests.training import kit

pytestmark = pytest.mark.more
# torch 2.7's sum of gradients is hidden by Adam; clipping would show it.
COMMON = {
    "global_train_batch_size": 4,
    "algorithms": {},
    "callbacks": {"spy": {"keep_gradients": True}, "guard": {}},
    "save_folder": None,
}
EPS = 1e-8  # Adam's
FSDP = {"fsdp_config": {"state_dict_type": "full"}}
ADAPTER = {"method": "dora"}
SLOW = pytest.mark.slow
WAYS = [
    (2, "ddp"),
    pytest.param(4, "ddp", marks=SLOW),
    (2, "fsdp2"),
    pytest.param(4, "fsdp2", marks=SLOW),
]


def variables(way):
    return {"FSDP_VERSION": "2"} if way == "fsdp2" else {}


def factor_of(num_ranks, way):
    """Return the factor by which FSDP2's gradients exceed one rank's."""
    return num_ranks if way == "fsdp2" and ADDS_UP else 1


def sharded(num_ranks, way):
    """Return a run's settings; Adam's steps do not depend on the scale of gradients and eps."""
    eps = EPS * factor_of(num_ranks, way)
    return {"optimizer__eps": eps, **(FSDP if way == "fsdp2" else {})}


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Return the results of two epochs on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {"full": COMMON, "adapter": COMMON | ADAPTER}
    return {name: kit.run(kit.run_config(world, folder, **one)) for name, one in runs.items()}


@pytest.mark.parametrize(("num_ranks", "way"), WAYS)
def test_a_course(world, alone, tmp_path, num_ranks, way):
    more = sharded(num_ranks, way)
    runs = {"full": COMMON | more, "adapter": COMMON | ADAPTER | more}
    found = launch(world, tmp_path, num_ranks, runs, **variables(way))
    factor = factor_of(num_ranks, way)
    for name, reference in alone.items():
        run = found[name]
        worst = max(abs(a / b - 1) for a, b in zip(run["losses"], reference.losses, strict=True))
        print(f"{num_ranks} ranks, {way}, {name}: losses differ by {worst:.1e} at most")
        assert run["losses"] == pytest.approx(reference.losses, rel=2e-5), name
        first = {key: factor * x for key, x in reference.spy.gradients[0].items()}
        kit.assert_same_gradients(run["gradients"][0], first)
        norms = [factor * x for x in reference.logged("guard/gradient_norm")]
        assert run["guard"]["guard/gradient_norm"] == pytest.approx(norms, rel=1e-3)
        for key, weight in reference.weights.items():
            key = key if key in run["weights"] else key.replace("lm_head", "model.embed_tokens")
            ours = run["weights"].get(key)
            if ours is None:  # the head, which is the embedding
                assert key.endswith("lm_head.weight") or "lm_head" in key
                continue
            torch.testing.assert_close(ours, weight, rtol=1e-3, atol=1e-4, msg=key)
        assert run["is_tied"], "the head is the embedding still, sharded or not"
        check_documents(run, reference)
    base = dict(kit.make_llama().named_parameters())
    for key, weight in found["adapter"]["weights"].items():
        if "lora_" not in key:
            name = key.replace("base_model.model.", "").replace("base_layer.", "")
            assert torch.equal(weight, base[name]), f"{key} is frozen"


def check_documents(run, reference):
    """Check that global batches have one rank's documents, each once per epoch."""
    theirs = [
        sorted(ids.tolist() for ids, _ in kit.documents_of(batch))
        for batch in reference.spy.batches
    ]
    together = [sorted(chain(*batches)) for batches in zip(*run["documents"], strict=True)]
    assert together == theirs
    dataset = reference.trainer.state.train_dataloader.dataset
    once = [tuple(one.input_ids.tolist()) for one in dataset.documents.read(dataset.sampler.used)]
    assert Counter(map(tuple, chain(*together))) == Counter(2 * once), "two epochs"
    assert run["clock"] == [2 * len(once), 2 * sum(map(len, once))]


def test_two_nodes(world, alone, tmp_path):
    """Two launchers with one rank each work as on two machines."""
    found = launch(world, tmp_path, 2, {"full": COMMON}, nodes=2)
    assert found["full"]["losses"] == pytest.approx(alone["full"].losses, rel=2e-5)
    check_documents(found["full"], alone["full"])


# --- amounts that no number of ranks divides -----------------------------------------------------


@pytest.fixture(scope="module")
def odd(world, make_rows, tmp_path_factory):
    """Return worlds with a single document, fewer packs than ranks, a prime number of documents,
    one document 64 times as long as the others, and one overlong document that is split."""
    folder = tmp_path_factory.mktemp("odd")
    short = make_rows(31, seed=4, longest=3)
    long = {"prompt": "long", "response": " ".join(["word"] * 400)}
    rows = {"one": short[:1], "few": short[:3], "prime": short, "long": [*short[:13], long]}
    paths = {}
    for name, content in rows.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in content))
    return paths


def odd_runs(world, odd, num_ranks):
    runs = {}
    for name, path in odd.items():
        size = {"max_seq_len": 256, "pack_tokens": 256} if name == "long" else {}
        loader = kit.loader_config(path, shuffle=True, **size)
        runs[name] = {
            **COMMON,
            "global_train_batch_size": 12 // num_ranks * num_ranks,
            "train_loader": loader,
            "eval_loader": kit.loader_config(path, eval_packs=1, **size),
            "eval_interval": "1ep",
        }
        if name == "long":
            runs[name] |= {"max_seq_len": 256, "tokenizer__kwargs__model_max_length": 256}
            positions = {"max_position_embeddings": 256}
            runs[name]["model__config_overrides"] = positions
    runs["long_split"] = {
        **runs["long"],
        "train_loader": kit.loader_config(odd["long"], shuffle=True, overlong="split"),
        "eval_loader": kit.loader_config(odd["long"], eval_packs=1, overlong="split"),
    }
    return runs


@pytest.fixture(scope="module")
def odd_alone(world, odd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd_alone")
    return {
        name: kit.run(kit.run_config(world, folder / name, **one))
        for name, one in odd_runs(world, odd, 1).items()
    }


@pytest.mark.parametrize(
    ("num_ranks", "way"),
    [
        (2, "ddp"),
        pytest.param(3, "ddp", marks=SLOW),
        pytest.param(4, "ddp", marks=SLOW),
        (4, "fsdp2"),
    ],
)
def test_odd_amounts(world, odd, odd_alone, tmp_path, num_ranks, way):
    runs = odd_runs(world, odd, num_ranks)
    runs = {name: {**one, **sharded(num_ranks, way)} for name, one in runs.items()}
    found = launch(world, tmp_path, num_ranks, runs, **variables(way))
    for name, reference in odd_alone.items():
        run = found[name]
        assert run["losses"] == pytest.approx(reference.losses, rel=2e-5), name
        check_documents(run, reference)
        expected = {key: x[-1] for key, x in reference.all_logged("metrics/eval/").items()}
        assert run["metrics"] == pytest.approx(expected, rel=2e-5), name
        assert len(expected) >= 3
    empty = sum(batch == [] for rank in found["one"]["documents"] for batch in rank)
    assert empty == 2 * (num_ranks - 1), "the other ranks had nothing, and trained along"


# --- checkpoints of 2 ranks ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_what_two_ranks_saved_goes_on_on_one_and_four(world, alone, tmp_path, way):
    """A checkpoint from inside an epoch continues on other numbers of ranks, optimizer included."""
    # Under FSDP2 eps has to change with the ranks here, which exact_resume refuses.
    exact = {"exact_resume": {}} if way == "ddp" else {}
    saving = {"callbacks": {**COMMON["callbacks"], **exact}}
    runs = {"full": COMMON | sharded(2, way), "adapter": COMMON | ADAPTER | sharded(2, way)}
    for name, one in runs.items():
        folder = str(tmp_path / "saved" / name / "checkpoints")
        runs[name] = {**one, **saving, "save_folder": folder}
    two = launch(world, tmp_path / "saved", 2, runs, **variables(way))
    paths = {name: kit.checkpoint(tmp_path / "saved" / name, 2) for name in runs}

    def rest(num_ranks, more):
        ratio = factor_of(num_ranks, way) / factor_of(2, way)
        return {
            name: {
                **one,
                **more,
                "load_path": str(rescaled(path, ratio)),
                "save_folder": str(tmp_path / f"goes-on-{num_ranks}" / name),
                "optimizer__eps": EPS * factor_of(num_ranks, way),
            }
            for (name, one), path in zip(runs.items(), paths.values(), strict=True)
        }

    four = launch(world, tmp_path / "four", 4, rest(4, {}), **variables(way))
    settings = rest(1, {"fsdp_config": None} if way == "fsdp2" else {})
    for name, reference in alone.items():
        assert two[name]["losses"] == pytest.approx(reference.losses, rel=2e-5)
        assert four[name]["losses"] == pytest.approx(reference.losses[2:], rel=2e-5)
        one = kit.run(kit.run_config(world, tmp_path / "one" / name, **settings[name]))
        assert one.losses == pytest.approx(reference.losses[2:], rel=2e-5)
        for key, weight in one.weights.items():
            torch.testing.assert_close(
                weight, reference.weights[key], rtol=1e-3, atol=1e-4, msg=key
            )


def rescaled(path, ratio):
    """Return a checkpoint's copy as if gradients were `ratio` times as large; see ADDS_UP."""
    if ratio == 1:
        return path
    content = torch.load(path, weights_only=False)
    for kept in content["state"]["optimizers"]["DecoupledAdamW"]["state"].values():
        kept["exp_avg"] *= ratio
        kept["exp_avg_sq"] *= ratio**2
    other = path.with_name(f"x{ratio}-{path.name}")
    torch.save(content, other)
    return other


# --- the guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_all_ranks_stop_and_skip_together(world, alone, tmp_path, way):
    """All ranks stop or skip although only one has the document that goes wrong."""
    dataset = alone["full"].trainer.state.train_dataloader.dataset
    dataset.sampler.set_epoch(0)
    number = int(dataset.sampler.batch(1)[1][0])  # of rank 1
    document = dataset.documents[number].input_ids.tolist()
    more = {"spoil": document, **sharded(2, way)}
    runs = {
        action: {**COMMON, **more, "callbacks": {"spy": {}, "guard": {"action": action}}}
        for action in ("stop", "skip")
    }
    found = launch(world, tmp_path, 2, runs, **variables(way))
    errors = found["stop"]["errors"]
    assert len(errors) == 2 and errors[0] == errors[1]
    cause = f"the loss is not finite; caused by document {number} of "
    assert f"batch 1 (epoch 0): {cause}" in errors[0]
    losses = found["skip"]["losses"]
    assert found["skip"]["guard"]["guard/skipped"] == [1, 2]
    assert losses[0] == pytest.approx(alone["full"].losses[0], rel=1e-6)
    assert sum(loss != loss for loss in losses) == 2
