"""Several ranks, over gloo on the CPU, do what one rank does. (Traps 18, 32.)

FSDP1 does not run without a GPU (trap 34), nor does `init_device: meta` under FSDP2.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.system.ranks import ADDS_UP, launch
from tests.training import kit

pytestmark = pytest.mark.more
METRICS = ("LanguageCrossEntropy", "LanguagePerplexity", "TokenAccuracy")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_do_what_one_does(world, finished, tmp_path, num_ranks):
    """Compare gradients, metrics and counters of an epoch; then continue one rank's adapter run.

    Composer's own launcher starts two ranks; three are forked, which takes a tenth of the time.
    """
    common = {"global_train_batch_size": 2 * num_ranks, "eval_interval": "1ep"}
    look = {
        **common,
        "callbacks": {"spy": {"keep_gradients": True}, "packed_throughput": {}},
        "optimizer__lr": 0.0,
        "algorithms": {},
        "max_duration": "1ep",
        "eval_loader": kit.loader_config(world.eval_rows, eval_packs=num_ranks - 1),
        # Trained, so that its accuracy is above zero.
        "model__pretrained_model_name_or_path": str(finished("full").folder / "hf"),
        "save_folder": None,
    }
    adapter = {**common, "method": "rslora", "autoresume": True}
    one = {}
    for name, settings in {"look": look, "adapter": adapter}.items():
        one[name] = kit.run(kit.run_config(world, tmp_path / "one" / name, **settings))
    first = kit.checkpoint(tmp_path / "one" / "adapter", 2)
    adapter = {**adapter, "autoresume": False, "load_path": str(first)}
    runs = {"look": look, "adapter": adapter}
    several = launch(world, tmp_path, num_ranks, runs, by_launcher=num_ranks == 2)

    here, there = one["look"], several["look"]
    assert there["packs"] == [2] * len(here.spy.batches) and len(there["packs"]) > 1
    for ours, theirs in zip(there["gradients"], here.spy.gradients, strict=True):
        kit.assert_same_gradients(ours, theirs)
    assert there["losses"] == pytest.approx(here.losses, rel=1e-6)
    for name in METRICS:
        name = f"metrics/eval/{name}"
        assert there["metrics"][name] == pytest.approx(here.logged(name)[-1], rel=1e-6) != 0, name
    clock = here.trainer.state.timestamp
    assert there["clock"] == [clock.sample, clock.token]
    for name, values in here.all_logged("packing/").items():
        assert there["throughput"][name] == pytest.approx(values), name

    here, there = one["adapter"], several["adapter"]
    assert there["losses"] == pytest.approx(here.losses[2:], rel=1e-5)
    # Under DDP, too, the checkpoint holds only the adapter, and one rank continues with it.
    last = kit.checkpoint(tmp_path / "adapter", len(here.losses))
    names = torch.load(last, weights_only=False)["state"]["model"]
    assert names and all("lora_" in name for name in names)
    settings = {**adapter, "load_path": str(last), "max_duration": "3ep"}
    on = kit.run(kit.run_config(world, tmp_path / "on", **settings))
    assert on.losses[0] < here.losses[0]


def test_fsdp2_shards_what_one_rank_trains(world, tmp_path):
    """Losses and exports are equal, and so are gradients, except those that FSDP2 sums."""
    factor = 2 if ADDS_UP else 1
    common = {"global_train_batch_size": 4, "optimizer__lr": 0.0, "algorithms": {}}
    common |= {"callbacks": {"spy": {"keep_gradients": True}}, "max_duration": "1ep"}
    adapter = {**common, "method": "dora"}
    one = kit.run(kit.run_config(world, tmp_path / "one", **common))
    kit.run(kit.run_config(world, tmp_path / "saved", **{**adapter, "optimizer__lr": 0.03}))
    saved = {"load_path": str(kit.checkpoint(tmp_path / "saved", 3)), "load_weights_only": True}
    again = kit.run(kit.run_config(world, tmp_path / "again", **adapter, **saved))

    exports = {name: tmp_path / f"{name}-hf" for name in ("cpu", "mixed", "dora")}
    runs = {
        "cpu": common,
        "mixed": {**common, "model__init_device": "mixed"},
        "dora": {**adapter, **saved},
    }
    for name, folder in exports.items():
        callbacks = {"spy": {"keep_gradients": True}, "hf_export": {"folder": str(folder)}}
        runs[name] = {**runs[name], "fsdp_config": {"state_dict_type": "full"}}
        runs[name]["callbacks"] = callbacks
    several = launch(world, tmp_path, 2, runs, FSDP_VERSION="2")

    for name, reference in {"cpu": one, "mixed": one, "dora": again}.items():
        assert several[name]["losses"] == pytest.approx(reference.losses, rel=1e-6), name
        pairs = zip(several[name]["gradients"], reference.spy.gradients, strict=True)
        for ours, theirs in pairs:
            wanted = {key: factor * value for key, value in theirs.items()}
            kit.assert_same_gradients(ours, wanted)
    base = load_file(world.base / "model.safetensors")
    for name in ("cpu", "mixed"):
        weights = load_file(exports[name] / "model.safetensors")
        assert weights.keys() == base.keys()
        assert all(torch.equal(weights[key], value) for key, value in base.items())
        config = (exports[name] / "config.json").read_text()
        assert config == (world.base / "config.json").read_text()
    last = torch.load(kit.checkpoint(tmp_path / "dora", 3), weights_only=False)["state"]["model"]
    first = torch.load(saved["load_path"], weights_only=False)["state"]["model"]
    assert last.keys() == first.keys()
    assert all(torch.equal(last[key], value) for key, value in first.items())
