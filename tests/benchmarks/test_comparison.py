"""Contents of a comparison, and its handling of variants that cannot run."""

import dataclasses
import json

import pytest
import torch

from benchmarks import comparison, report, step_time
from benchmarks.comparison import Options, best_rows, compare
from benchmarks.variants import Bench, Step
from foundry_ext.models.flops import training_flops

MEASURED = {
    *("method", "variant", "title", "rows", "loss", "microbatches", "slots", "fill", "seconds"),
    *("tokens_per_second", "tokens_per_second_least", "tokens_per_second_most"),
    *("loss_tokens_per_second", "flops", "operators"),
}
NAMES = ["hf_padded", "hf_padding_free", "ours"]


def silent(_line):
    pass


@pytest.fixture(scope="module")
def result(workload, make_setup):
    setups = {method: make_setup(method=method) for method in ("full", "lora")}
    return compare(setups, workload, NAMES, Options(repeats=3, workers=0), say=silent)


def test_the_results_schema(result, workload):
    assert json.loads(json.dumps(result)) == result
    assert result["workload"]["tokens"] == workload.num_tokens
    assert result["workload"]["loss_tokens"] == workload.num_loss_tokens
    rows = {(row["method"], row["variant"]): row for row in result["variants"]}
    assert set(rows) == {(method, name) for method in ("full", "lora") for name in NAMES}
    for (_, name), row in rows.items():
        if name == "hf_padding_free":
            assert row["absent"] == "needs a GPU"
            continue
        assert set(row) >= MEASURED
        assert len(row["seconds"]) == 3
        assert row["fill"] == pytest.approx(workload.num_tokens / row["slots"])
        assert 0 <= row["data_wait"] <= 1
    assert rows["full", "hf_padded"]["fill"] < rows["full", "ours"]["fill"] == 1
    assert rows["full", "ours"]["loss"] == pytest.approx(
        rows["full", "hf_padded"]["loss"], rel=1e-4
    )


def test_ratios_are_of_the_same_rounds_and_method(result):
    rows = {(row["method"], row["variant"]): row for row in result["variants"]}
    ours, theirs = rows["lora", "ours"], rows["lora", "hf_padded"]
    quotients = [a / b for a, b in zip(theirs["seconds"], ours["seconds"], strict=True)]
    assert ours["over_hf_padded"]["median"] == sorted(quotients)[1]
    quotients = [
        a / b for a, b in zip(rows["full", "ours"]["seconds"], ours["seconds"], strict=True)
    ]
    assert ours["over_full"]["median"] == sorted(quotients)[1]
    assert "over_hf_padded" not in theirs and "over_full" not in rows["full", "ours"]


def test_flops_are_of_the_documents_and_know_what_is_frozen(result, workload, make_setup):
    setup = make_setup(method="lora")
    bench = Bench(setup)
    counts = {
        "num_tokens": workload.num_tokens,
        "num_loss_tokens": workload.num_loss_tokens,
        "sum_squared_lengths": workload.sum_squared_lengths,
    }
    adapter = sum(p.numel() for p in bench.source.parameters() if p.requires_grad)
    wanted = {
        "full": training_flops(setup.config(), **counts),
        "lora": training_flops(
            setup.config(), **counts, frozen_base=True, adapter_parameters=adapter
        ),
    }
    assert wanted["full"] != wanted["lora"]
    for row in result["variants"]:
        assert row.get("flops", wanted[row["method"]]) == wanted[row["method"]]


class Slow(Step):
    """A step that records its rows; more than four are out of memory."""

    def __call__(self):
        size = self.batches[0]["input_ids"].shape[0]
        if size > 4:
            raise torch.OutOfMemoryError("no memory")
        self.rows = size
        return torch.zeros(())


def test_the_microbatch_is_the_fastest_that_fits(workload, make_setup, monkeypatch):
    bench = Bench(make_setup())
    wide = dataclasses.replace(workload, microbatches=(1, 2, 4, 5))
    monkeypatch.setattr("benchmarks.variants.Step", Slow)
    times = {1: 3.0, 2: 2.0, 4: 2.5}
    monkeypatch.setattr(comparison, "seconds", lambda step, device, steps: times[step.rows])
    assert best_rows(bench, "hf_padded", wide) == 2
    assert best_rows(bench, "ours", wide) is None
    times[4] = 1.0
    assert best_rows(bench, "hf_padded", wide) == 4


def test_a_variant_out_of_memory_is_reported_and_the_rest_goes_on(
    workload, make_setup, monkeypatch
):
    def warm_up(step, *_):
        if step.num_computed_tokens > workload.num_tokens:
            raise torch.OutOfMemoryError("no memory")
        return {"loss": 0.0}

    monkeypatch.setattr(comparison, "_warm_up", warm_up)
    options = Options(repeats=1, kernels=False)
    found = compare({"full": make_setup()}, workload, ["hf_padded", "ours"], options, say=silent)
    theirs, ours = found["variants"]
    assert theirs["absent"] == "out of memory"
    assert ours["tokens_per_second"] > 0 and "over_hf_padded" not in ours


def test_the_table_has_a_row_a_variant_and_no_empty_column(result):
    lines = report.markdown([result], "cpu").splitlines()
    assert len(lines) == 2 + len(result["variants"])
    assert len({line.count("|") for line in lines}) == 1
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert "real tokens/CPU-s" in header and "over HF padded" in header
    assert "MFU" not in header and "peak GiB" not in header
    assert any("needs a GPU" in line for line in lines)


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, make_setup, capsys):
    path = tmp_path / "out.json"
    words = f"--lengths c --labelled 0.5 --pack-tokens 256 --repeats 1 --json {path}".split()
    monkeypatch.setattr("sys.argv", ["benchmarks/step_time.py", *words, "--device", "cpu"])
    monkeypatch.setattr(
        step_time, "setup_of", lambda options, model, method: make_setup(method=method)
    )
    step_time.main()
    written = json.loads(path.read_text())
    assert written["schema"] == report.SCHEMA
    assert written["machine"]["torch"] == torch.__version__
    assert written["command"].endswith(" ".join([*words, "--device", "cpu"]))
    assert [row["variant"] for row in written["results"][0]["variants"]] == ["hf_padded", "ours"]
    assert "| ours, as shipped |" in capsys.readouterr().out


@pytest.mark.parametrize("key, value", [("methods", "qlora"), ("variants", "ou"), ("lengths", "d")])
def test_an_unknown_name_is_refused(key, value, capsys):
    with pytest.raises(SystemExit):
        step_time.parse([f"--{key}", value, "--device", "cpu"])
    assert repr(value) in capsys.readouterr().err
