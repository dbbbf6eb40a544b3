"""The run record: checked, atomic, without secrets."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foundry_ext.records.record import (
    SCHEMA_VERSION,
    items_path,
    mark_failed,
    new_record,
    read_items,
    read_record,
    redact,
    validate,
    write_record,
)
from foundry_ext.records.schema import Record
from foundry_ext.utils.redaction import REDACTED, is_secret_name

ROOT = Path(__file__).parents[2]


@pytest.fixture
def record():
    loader = {
        "name": "meta-math/MetaMathQA",
        "revision": None,
        "fingerprint": "ab12-64-17-1",
        "documents": 12,
        "tokens": 300,
        "counts": {"kept": 12, "tokens_cut": 0},
    }
    record = new_record(
        run_name="lora_s17",
        experiment="metamathqa",
        method="lora",
        seed=17,
        learning_rate=1e-3,
        config={"seed": 17, "optimizer": {"lr": 1e-3}},
        environment={
            "python": "3.11.2",
            "packages": {"torch": "2.7.0"},
            "commit": None,
            "dirty": None,
            "device": "a CPU",
            "device_kind": "cpu",
            "world_size": 1,
        },
        data={"train": loader, "eval": {"target": dict(loader)}},
        model={
            "name": "smollm2-135m",
            "parameters": 100,
            "trainable_parameters": 10,
            "rank": 8,
            "alpha": 16,
            "effective_scale": 2.0,
            "target_modules": ["q_proj"],
            "init": None,
        },
        items="items.jsonl",
    )
    record["evaluations"].append(
        {
            "step": 0,
            "real_tokens": 0,
            "metrics": {"target/loss": 5.6},
            "learning": {"target_loss": 0.0},
            "forgetting": {},
        }
    )
    return record


def test_what_is_written_is_read(record, tmp_path):
    path = tmp_path / "deep" / "record.json"
    write_record(path, record)
    assert read_record(path) == record
    assert record["schema_version"] == SCHEMA_VERSION and record["status"] == "running"
    assert record["pid"] == os.getpid()
    assert items_path(path, record) == tmp_path / "deep" / "items.jsonl"
    assert os.listdir(path.parent) == ["record.json"]


def test_a_diverged_run_has_a_record(record, tmp_path):
    record["evaluations"][0]["metrics"]["target/loss"] = math.nan
    write_record(tmp_path / "record.json", record)
    read = read_record(tmp_path / "record.json")
    assert math.isnan(read["evaluations"][0]["metrics"]["target/loss"])


@pytest.mark.parametrize(
    "place, value, names",
    [
        ("seed", "17", "seed: '17' must be "),
        ("seed", True, "seed: True must be "),
        ("learning_rate", None, "learning_rate: None must be "),
        ("tokens.real", 1.5, "tokens.real: 1.5 must be "),
        ("environment.packages", {"torch": 2.7}, "environment.packages.torch: 2.7 must be "),
        ("environment.dirty", 1, "environment.dirty: 1 must be "),
        ("config", [1], r"config: \[1\] must be "),
        ("time", 3, "time: 3 must be "),
        ("data.eval", {"a": {}}, "data.eval.a.name: missing"),
        ("evaluations", {}, "evaluations: {} must be "),
        ("evaluations.0.learning", {"target_loss": "1"}, "evaluations.0.learning.target_loss: '1'"),
        ("status", "done", "status: 'done' must be .*'running'.*'stopped'"),
        ("items", "../other/items.jsonl", "items: '../other/items.jsonl' must not leave the rec"),
        ("items", "/etc/passwd", "items: '/etc/passwd' must not leave the record's folder; give"),
        ("items", "a" * 201, "items: 'aaa.*' must .* 200 "),
        ("remarks", "hm", "remarks: unknown key; the keys are schema_version, "),
        ("schema_version", 2, "schema_version: 2; this version of foundry_ext reads 1"),
    ],
)
def test_what_is_wrong_is_named(record, tmp_path, place, value, names):
    broken = copy.deepcopy(record)
    *parents, last = (int(key) if key.isdigit() else key for key in place.split("."))
    at = broken
    for key in parents:
        at = at[key]
    at[last] = value
    with pytest.raises(ValueError, match=f"^{names}".replace("{", r"\{")):
        validate(broken)
    path = tmp_path / "record.json"
    with pytest.raises(ValueError):
        write_record(path, broken)
    assert not path.exists()
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"record\.json: "):
        read_record(path)


@pytest.mark.parametrize("key", ["started", "tokens", "evaluations"])
def test_a_missing_key_is_named(record, key):
    del record[key]
    with pytest.raises(ValueError, match=f"^{key}: missing"):
        validate(record)


def test_unknown_keys_of_sections_are_kept(record, tmp_path):
    """A later version may add keys to sections; only the top level is closed."""
    record["model"]["remarks"] = record["evaluations"][0]["remarks"] = "hm"
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record


def test_numbers_and_texts_that_json_can_hold(record, tmp_path):
    """Integers pass for floats, and so do undecodable bytes of a path in an error's text."""
    record.update(learning_rate=1, error="no file \udcff", peak_memory_bytes=2**70)
    record["throughput"].update(real_tokens_per_second=math.inf, mfu=0)
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record


def test_every_key_is_explained():
    def leaves(schema, name):
        for key, field in schema.get("properties", {}).items():
            section = definitions.get(field.get("$ref", "").rpartition("/")[2])
            assert (section or field).get("description"), f"{name}.{key}"
            yield from leaves(section, key) if section else [key]

    schema = Record.model_json_schema()
    definitions = schema["$defs"]
    assert {"seed", "real", "fill", "wall_seconds"} <= set(leaves(schema, "record"))
    for name in ("Evaluation", "Loader"):  # in lists and mappings
        assert list(leaves(definitions[name], name))


def test_a_record_of_before_data_wait_was_recorded_is_read(record):
    del record["throughput"]["waiting_for_data"]
    validate(record)
    record["throughput"]["waiting_for_data"] = "much"
    with pytest.raises(ValueError, match=r"^throughput\.waiting_for_data: 'much' must be "):
        validate(record)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"loss": 3}', "\x00"])
def test_what_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json: "):
        read_record(path)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none.json")


def test_a_kill_before_the_rename_leaves_the_old_record(record, tmp_path):
    path = tmp_path / "record.json"
    write_record(path, record)
    code = f"""
import os, signal
from foundry_ext.records import record as module
record = module.read_record({str(path)!r})
record["steps"] = 99
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
module.write_record({str(path)!r}, record)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert read_record(path) == record
    write_record(path, {**record, "steps": 100})  # what was left behind is in nobody's way
    assert read_record(path)["steps"] == 100 and os.listdir(tmp_path) == ["record.json"]


def test_an_error_marks_this_process_s_running_record(record, tmp_path):
    path = tmp_path / "record.json"
    mark_failed(path, ValueError("no record there"))
    assert not path.exists()
    write_record(path, record)
    mark_failed(path, RuntimeError("out of memory"))
    failed = read_record(path)
    assert (failed["status"], failed["error"]) == ("failed", "RuntimeError: out of memory")
    assert failed["ended"] == failed["updated"] >= failed["started"]
    for other in ({**record, "pid": os.getpid() + 1}, {**record, "status": "finished"}):
        write_record(path, other)
        mark_failed(path, RuntimeError("another run's"))
        assert read_record(path) == other


def test_of_two_lines_for_an_item_the_later_wins(tmp_path):
    path = tmp_path / "items.jsonl"
    lines = [
        {"step": 0, "set": "target", "item": "1", "loss": 1.0},
        {"step": 0, "set": "target", "item": "2", "loss": 2.0},
        {"step": 0, "set": "source", "item": "1", "loss": 3.0},
        {"step": 0, "set": "target", "item": "1", "loss": 4.0},
        {"step": 5, "set": "target", "item": "1", "loss": 5.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "se')
    assert sorted(item["loss"] for item in read_items(path)) == [2.0, 3.0, 4.0, 5.0]
    path.write_text('{"step": 5, "se\n' + json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match=r"items\.jsonl, line 1"):
        read_items(path)


SECRETS = ["WANDB_API_KEY", "HF_TOKEN", "hf_token", "token", "auth_token", "apiKey", "api-key"]
SECRETS += ["password", "aws_secret_access_key", "HUGGING_FACE_HUB_TOKEN", "AWS_SESSION_TOKEN"]
SECRETS += ["OPENAI_KEY", "wandb_key"]
PLAIN = ["tokens", "max_new_tokens", "pack_tokens", "eos_token", "pad_token_id", "text_key", "by"]
PLAIN += ["tokenizer", "real_tokens", "seed", "target_modules", "author", "monkey", "keys"]


@pytest.mark.parametrize("name", SECRETS)
def test_keys_of_secrets_are_known(name):
    assert is_secret_name(name)
    assert redact({"a": [{name: "x1"}]}) == {"a": [{name: REDACTED}]}
    assert redact({name: {"user": "x1", "on": True}}) == {name: {"user": REDACTED, "on": True}}


@pytest.mark.parametrize("name", PLAIN)
def test_other_keys_keep_their_values(name):
    assert redact({name: "x1"}) == {name: "x1"}


@pytest.mark.parametrize(
    "text, left",
    [
        ("https://me:s3cret@host/x", f"https://{REDACTED}@host/x"),
        ("https://host/x?a=1&token=s3cret&b=2", f"https://host/x?a=1&token={REDACTED}&b=2"),
        ("https://host/x?X-Amz-Signature=ab12", f"https://host/x?X-Amz-Signature={REDACTED}"),
        ("run --api-key=s3cret now", f"run --api-key={REDACTED} now"),
        ("see hf_" + "a1B2" * 8 + ".", f"see {REDACTED}."),
        ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {REDACTED}"),
        ("eos_token=<|endoftext|>", "eos_token=<|endoftext|>"),
        ("hf://datasets/a/b@main", "hf://datasets/a/b@main"),
        ("outputs/hf_export", "outputs/hf_export"),
    ],
)
def test_secrets_inside_texts(text, left):
    assert redact({"a": [text]}) == {"a": [left]}


def test_the_environment_s_secrets_never_enter(record, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("HF_TOKEN", "something-of-no-shape")
    record["config"]["note"] = "x 0123456789abcdef0123456789abcdef01234567 y"
    record["error"] = "OSError: something-of-no-shape is not accepted"
    write_record(tmp_path / "record.json", record)
    text = (tmp_path / "record.json").read_text()
    assert "0123456789abcdef" not in text and "no-shape" not in text
    assert read_record(tmp_path / "record.json")["config"]["note"] == f"x {REDACTED} y"


def test_reading_a_record_needs_no_torch():
    code = "import sys, foundry_ext.records.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
