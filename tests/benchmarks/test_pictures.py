"""The ladder, the profile, the scaling curves and the loss check, on tiny shapes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks import ladder, loss_check, profile_step, scaling, step_time
from benchmarks.comparison import Options, compare
from benchmarks.variants import Bench

PNG = b"\x89PNG"


def silent(_line):
    pass


@pytest.fixture
def tiny(monkeypatch, make_setup):
    """Make commands measure a tiny setup instead of the shape that they name."""

    def setup_of(options, model, method):
        return make_setup(method=method)

    for module in (ladder, profile_step, step_time):
        monkeypatch.setattr(module, "setup_of", setup_of)
    return setup_of


def test_the_ladder_is_drawn_from_its_json(tmp_path, monkeypatch, workload, make_setup):
    options = Options(repeats=2, kernels=False)
    rows = {"hf_padded": 2, "unpadded": 2, "unpadded_larger": 4}
    result = compare(
        {"full": make_setup()}, workload, list(ladder.RUNGS), options, rows, say=silent
    )
    measured = [row for row in result["variants"] if "absent" not in row]
    assert [row["rows"] for row in measured] == [2, 2, 4, None, None]
    machine = {"device": "a machine", "torch": "2", "date": "today"}
    settings = {"device": "cpu", "model": "smollm2-135m", "precision": "fp32"}
    report = {"machine": machine, "settings": settings, "results": [result]}
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(report))
    monkeypatch.setattr("sys.argv", ["ladder.py", "--draw", str(path)])
    ladder.main()
    assert (tmp_path / "ladder.png").read_bytes().startswith(PNG)
    svg = (tmp_path / "ladder.svg").read_text()
    (result,) = report["results"]
    result["variants"] = [row for row in result["variants"] if row["variant"] != "unpadded"]
    path.write_text(json.dumps(report))
    ladder.main()
    assert (tmp_path / "ladder.svg").read_text() != svg  # it is the JSON that is drawn


def test_rungs_below_the_packed_ones_have_the_same_microbatch(workload, make_setup):
    found = ladder._rows(make_setup(), workload)
    assert found == {"hf_padded": 2, "unpadded": 2, "unpadded_larger": 4}


def test_the_last_rung_is_compiled():
    assert ladder.parse(["--device", "cpu"]).compile == "layers"


def test_a_profile_finds_every_part_of_a_step(workload, make_setup):
    for name in ("hf_padded", "ours"):
        step = Bench(make_setup(precision="bf16")).step(name, workload)
        step()
        found = profile_step.group_times(step, "cpu", 131)
        assert set(found) == set(profile_step.GROUPS)
        assert all(found[group] > 0 for group in profile_step.GROUPS)


def event(name, parent=None, shapes=(), kernels=()):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        input_shapes=list(shapes),
        kernels=list(kernels),
        device_type=DeviceType.CPU,
    )


def kernel(name, microseconds):
    return SimpleNamespace(name=name, duration=microseconds, device_time_total=microseconds)


def on_device(name, microseconds):
    return SimpleNamespace(
        name=name,
        device_time_total=microseconds,
        device_type=DeviceType.CUDA,
        cpu_parent=None,
        kernels=[],
    )


@pytest.mark.parametrize(
    "chain, shapes, group",
    [
        (["aten::mm"], [[7, 576], [576, 1536]], "trunk products"),
        (["aten::mm"], [[7, 576], [576, 999]], "head and loss"),
        (["aten::mm", "foundry_ext::blockwise_attention"], [[7, 8], [8, 7]], "attention"),
        (["aten::mul", "Optimizer.step#AdamW.step"], [[999, 576]], "optimizer"),
        (["aten::mul"], [[7, 576]], "norm, rotary, SwiGLU, casts"),
        (["aten::fill_", "aten::embedding_dense_backward"], [[999, 576]], "other"),
        (["cudaLaunchKernel"], [], "other"),
    ],
)
def test_groups(chain, shapes, group):
    found = None
    for name in chain[::-1]:
        found = event(name, found, shapes)
    assert profile_step.group_of(found, 999) == group


def test_a_gpus_kernels_count_once_whoever_launched_them():
    product = event("aten::mm", None, [[7, 576], [576, 576]], [kernel("nvjet_x", 30)])
    events = [product, on_device("nvjet_x", 30), on_device("nvjet_x", 5)]
    events += [on_device("triton_poi_y", 7), on_device("Memcpy HtoD", 100)]
    launched = list(profile_step.launched(events, 999))
    assert launched == [("trunk products", "nvjet_x", pytest.approx(30e-6))]
    rest = profile_step.not_launched(events)
    assert rest == {"nvjet_x": pytest.approx(5e-6), "triton_poi_y": pytest.approx(7e-6)}


def test_the_profile_command(tmp_path, monkeypatch, tiny, capsys):
    words = ["--pack-tokens", "128", "--json", str(tmp_path / "p.json"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["profile_step.py", *words])
    monkeypatch.setattr(profile_step, "product_rate", lambda device, dtype: 1e9)
    profile_step.main()
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 10 and "trunk products" in lines[2]
    for row in json.loads((tmp_path / "p.json").read_text())["results"]:
        assert sum(row["groups"].values()) == pytest.approx(row["seconds"])


@pytest.mark.parametrize("axis", scaling.AXES)
def test_scaling(axis, tmp_path, monkeypatch, tiny, capsys):
    points = {"pack_tokens": (64, 128), "model": ("smollm2-135m",), "document_length": (16, 64)}
    monkeypatch.setitem(scaling.AXES, axis, {"cpu": points[axis]})
    monkeypatch.setitem(scaling.PACK_TOKENS, "cpu", dict.fromkeys(points, 128))
    path = tmp_path / "scale.json"
    words = ["--scale", axis, "--repeats", "2", "--json", str(path), "--device", "cpu"]
    report = scaling.run(step_time.parse(words), tiny)
    assert [row["name"] for row in report["results"]] == [str(point) for point in points[axis]]
    assert (tmp_path / "scale.png").read_bytes().startswith(PNG)
    assert json.loads(path.read_text())["results"] == report["results"]
    if axis == "document_length":
        short, long = report["results"]
        assert short["tokens"] == long["tokens"] == 128
        assert short["flops_per_token"] < long["flops_per_token"]


def test_the_loss_check_compares_the_same_data(make_setup):
    setup = dataclasses.replace(
        make_setup(learning_rate=1e-2, backend="sdpa"),
        config_overrides=loss_check.SMALL | {"num_hidden_layers": 1},
    )
    row = loss_check.compare_seed(setup, seed=1, num_steps=6)
    assert row["difference"] == 0 and row["largest"] == 0  # fp32, eager: the plain path itself
    assert row["curves"]["plain"][-1] < row["curves"]["plain"][0] - 0.05
    half = loss_check.compare_seed(dataclasses.replace(setup, precision="bf16"), 1, 6)
    assert half["largest"] > 0
    other = loss_check.compare_seed(setup, seed=2, num_steps=6)
    assert other["plain"] != row["plain"]


def test_the_loss_checks_verdict():
    def rows(differences):
        plain = (1.0, 1.1, 1.2)
        return [
            {"plain": value, "difference": difference}
            for value, difference in zip(plain, differences, strict=True)
        ]

    near, far = (loss_check.summary(rows(d)) for d in ([0.01, -0.02, 0], [0.01, -0.2, 0]))
    assert near["within_noise"] and near["seed_noise"] == pytest.approx(0.1)
    assert not far["within_noise"] and "MORE than seed noise" in far["text"]
