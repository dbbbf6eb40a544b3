"""`foundry-ext inspect`: the page shows what the model receives, and escapes the data."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from foundry_ext.utils.constants import IGNORE_INDEX
from tests.browser import dom, foreign_references, needs_browser, screenshot
from tests.data.kit import build, walk

SCRIPT = "<script>document.title='taken over'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def config(tokenizer_folder, make_rows, write_jsonl, tmp_path, monkeypatch) -> dict[str, Any]:
    """Return a resolved configuration with a hostile and an overlong row, and replayed text."""
    monkeypatch.chdir(tmp_path)
    rows = make_rows(150, longest=12)
    rows[7]["response"] = f" {SCRIPT} & \u20ac\n\ttabbed"
    rows[8]["response"] = "~" * 300
    rows[9]["prompt"] = ""
    texts = [{"body": f"replayed page {i} of <b>rivers</b>"} for i in range(20)]
    dataset = {
        "datasets": [
            {"hf_name": str(write_jsonl(rows, "rows.jsonl")), "split": "train"},
            {
                "hf_name": str(write_jsonl(texts, "texts.jsonl")),
                "split": "train",
                "text_key": "body",
                "share": 0.1,
            },
        ],
        "max_seq_len": 160,
        "pack_tokens": 512,
        "shuffle": True,
        "fixed_shape": True,
    }
    evaluated = {**dataset, "datasets": dataset["datasets"][:1], "fixed_shape": False}
    return {
        "tokenizer": {"name": str(tokenizer_folder), "kwargs": {}},
        "train_loader": {"name": "packed_finetuning", "dataset": dataset, "num_workers": 2},
        "eval_loader": [{"label": "held_out", "name": "packed_finetuning", "dataset": evaluated}],
        "global_train_batch_size": 3,
        "device_eval_batch_size": 2,
    }


@pytest.fixture
def inspection(config):
    from foundry_ext.preflight.inspect.packs import inspect_config

    return inspect_config(config, name="yamls/my.yaml", num_packs=1000)


def test_the_packs_are_those_of_training(inspection, config, tokenizer):
    batches = walk(build(tokenizer, config["train_loader"]["dataset"], size=3))
    packs = [pack for batch in batches for pack in batch]
    assert len(inspection.packs) == len(packs) > 4
    assert [(p.batch, p.index_in_batch) for p in inspection.packs[:4]] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
    ]
    for view, pack in zip(inspection.packs, packs, strict=True):
        tokens = [token for document in view.documents for token in document.tokens]
        real = pack["num_tokens"]
        assert [token.id for token in tokens] == pack["input_ids"][0, :real].tolist()
        assert [token.position for token in tokens] == pack["position_ids"][0, :real].tolist()
        labels = pack["labels"][0, :real].tolist()
        assert [token.has_loss for token in tokens] == [x != IGNORE_INDEX for x in labels]
        assert all(d.tokens[0].position == 0 and not d.tokens[0].has_loss for d in view.documents)
        assert view.num_computed_tokens == 512 and view.num_tokens == real == len(tokens)
        assert view.num_loss_tokens == pack["num_loss_tokens"]


def test_the_totals_are_the_sums_of_the_packs(inspection):
    epoch, documents = inspection.epoch, [d for p in inspection.packs for d in p.documents]
    assert epoch.num_documents == len(documents)
    assert epoch.num_tokens == sum(len(d.tokens) for d in documents)
    assert epoch.num_loss_tokens == sum(d.num_loss_tokens for d in documents)
    whole = [pack for pack in inspection.packs if pack.documents]
    assert (epoch.num_packs, epoch.num_empty_packs) == (
        len(whole),
        len(inspection.packs) - len(whole),
    )
    assert epoch.packing_efficiency == pytest.approx(
        sum(pack.packing_efficiency for pack in whole) / len(whole)
    )
    assert epoch.longest == max(len(d.tokens) for d in documents) == 160


def test_sources_and_outcomes(inspection):
    main, replay = inspection.sources
    assert main["counts"]["truncated"] == 1 and main["counts"]["dropped_empty"] == 1
    documents = [d for pack in inspection.packs for d in pack.documents]
    by_source = [d for d in documents if d.source.endswith("texts.jsonl")]
    assert len(by_source) == replay["documents"]
    text = "".join(token.text for token in by_source[0].tokens)
    assert text.startswith("replayed page")
    (cut,) = [d for d in documents if d.outcome == "truncated"]
    assert cut.num_truncated_tokens == main["counts"]["tokens_cut"] > 100
    assert not cut.source.endswith("texts.jsonl")


def test_bytes_of_a_character_are_shown_as_such(inspection, tokenizer):
    from foundry_ext.preflight.inspect.packs import token_text

    ids = tokenizer("\u20ac")["input_ids"]
    assert len(ids) == 3, "the tokenizer knows the euro sign: choose another"
    assert [token_text(token, tokenizer) for token in ids] == ["<E2>", "<82>", "<AC>"]
    assert token_text(tokenizer.eos_token_id, tokenizer) == "<|endoftext|>"


def test_the_eval_loader(config):
    from foundry_ext.preflight.inspect.packs import inspect_config

    inspection = inspect_config(config, name="a.yaml", loader="eval", num_packs=1)
    assert len(inspection.packs) == 1 and len(inspection.sources) == 1
    assert inspection.packs[0].num_computed_tokens == inspection.packs[0].num_tokens
    assert inspection.epoch.batch_packs == 2


def page_text(page: str) -> str:
    """Return the text of the tokens as a reader sees it."""
    tokens = re.findall(r"<([bi]) title=\"\d+, id \d+\">(.*?)</\1>", page, re.DOTALL)
    return unescape("".join(text for _, text in tokens)).replace("<u>\u21b5</u>", "")


def test_the_page_shows_the_text_and_runs_none_of_it(inspection):
    from foundry_ext.preflight.inspect.page import format_inspection

    page = format_inspection(inspection)
    assert "<script" not in page and "<img" not in page
    assert SCRIPT in page_text(page)
    assert not foreign_references(page)
    assert "default-src 'none'" in page
    for words in ("tokens cut from its end", "filler tokens", "texts.jsonl", "dropped empty"):
        assert words in page
    positions = re.findall(r"<sub>(\d+)</sub>", page)
    assert {"64", "128"} == set(positions)


def test_a_count_that_one_source_alone_has_is_shown(inspection):
    from foundry_ext.preflight.inspect.page import format_inspection

    main, replay = inspection.sources
    replay = {**replay, "counts": {**replay["counts"], "responses_not_trained": 4321}}
    page = format_inspection(replace(inspection, sources=[main, replay]))
    assert "responses not trained" in page and "4,321" in page


def test_a_hostile_yaml_and_source_are_escaped(inspection):
    from foundry_ext.preflight.inspect.packs import TokenView
    from foundry_ext.preflight.inspect.page import format_inspection

    sources = [{**inspection.sources[0], "name": SCRIPT, "split": SCRIPT, "revision": SCRIPT}]
    packs = inspection.packs[:1]
    tokens = [TokenView(text=SCRIPT, id=1, position=0, has_loss=True)]
    documents = [replace(packs[0].documents[0], source=SCRIPT, tokens=tokens)]
    hostile = replace(
        inspection,
        name=SCRIPT,
        tokenizer=SCRIPT,
        sources=sources,
        packs=[replace(packs[0], documents=documents)],
    )
    page = format_inspection(hostile)
    assert "<script" not in page and "<img" not in page
    assert page_text(page) == SCRIPT


@needs_browser
def test_a_browser_shows_it(inspection, tmp_path):
    from foundry_ext.preflight.inspect.page import format_inspection

    page = tmp_path / "page.html"
    page.write_text(format_inspection(inspection), encoding="utf-8")
    built = dom(page, tmp_path / "profile")
    assert "<title>yamls/my.yaml: train_loader</title>" in built, "a script of the data ran"
    assert built.count("<section>") == len(inspection.packs)
    assert SCRIPT in page_text(built)
    image = tmp_path / "page.png"
    screenshot(page, image, tmp_path / "profile", width=1200)
    assert image.stat().st_size > 50_000


def test_errors(config):
    from foundry_ext.preflight.inspect.packs import inspect_config

    with pytest.raises(ValueError, match=r"packs: .* 0$"):
        inspect_config(config, name="a", num_packs=0)
    config["eval_loader"] = None
    with pytest.raises(ValueError, match="eval_loader: this YAML has none"):
        inspect_config(config, name="a", loader="eval")
    config["train_loader"]["name"] = "finetuning"
    with pytest.raises(ValueError, match=r"train_loader.name: .* 'finetuning'"):
        inspect_config(config, name="a")


def test_the_command(config, tmp_path, capsys):
    from foundry_ext.cli.main import main

    yaml = tmp_path / "run.yaml"
    whole = {
        **config,
        "model": {"name": "smollm2_packed", "pretrained_model_name_or_path": "smollm2-135m"},
        "optimizer": {"name": "decoupled_adamw"},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "1ba"},
        "max_duration": "1ep",
        "max_seq_len": 160,
        "eval_interval": 1,
        "device_train_microbatch_size": 1,
    }
    yaml.write_text(json.dumps(whole))
    out = tmp_path / "pages" / "page.html"
    assert main(["inspect", str(yaml), "--packs", "2", "--out", str(out)]) == 0
    assert out.read_text().count("<section>") == 2
    printed = capsys.readouterr().out
    assert f"{out}: 2 of " in printed and "ends with <|endoftext|>" in printed
    assert "ends with &lt;|endoftext|&gt;" in out.read_text()
    one_pack = [str(yaml), "train_loader.dataset.pack_tokens=65536", "global_train_batch_size=3"]
    assert main(["inspect", *one_pack, "--out", str(out)]) == 0
    assert f"{out}: 1 of 1 packs and 2 empty;" in capsys.readouterr().out
    given = [str(yaml), "train_loader.dataset.pack_tokens=1024"]
    assert main(["inspect", *given, "--loader", "train", "--out", str(out)]) == 0
    assert "of 1,024 tokens" in out.read_text()
    assert main(["inspect", str(yaml), "train_loader.dataset.max_seqlen=2"]) == 2
    assert "unknown key dataset.max_seqlen" in capsys.readouterr().err
    assert main(["inspect", str(yaml), str(yaml)]) == 2
    assert not Path("inspect.html").exists()
