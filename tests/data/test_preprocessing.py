"""Preprocessing functions: the source they depend on, and nulls that would become text."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pytest
import yaml

from foundry_ext.data import prompts
from foundry_ext.data.preprocessing import format_row, module_sources
from foundry_ext.data.rows import JsonValue, without_empty_columns
from foundry_ext.data.sources import load_rows
from foundry_ext.utils.errors import UserError
from tests.data.kit import build

FILES = {
    "rows_a.py": (
        "import json, os\nfrom helpers_a.deep import TEMPLATE\nimport numpy\n"
        "def f(row):\n    from late_a import more\n"
        "    return {'prompt': TEMPLATE + row['prompt'], 'response': more(row['response'])}\n"
    ),
    "late_a.py": "def more(text):\n    return text + ''\n",
    "helpers_a/__init__.py": "SPACE = ' '\n",
    "helpers_a/deep.py": "from . import other\nfrom .other import WORD\nTEMPLATE = WORD + 'x '\n",
    "helpers_a/other.py": "WORD = 'a '\n",
    "unrelated_a.py": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.split(".")[0].endswith("_a")]:
        del sys.modules[name]


def function():
    return importlib.import_module("rows_a").f


def test_the_users_own_modules_count_and_no_others(folder):
    wanted = {"rows_a", "late_a", "helpers_a", "helpers_a.deep", "helpers_a.other"}
    assert module_sources(function()).keys() == wanted


def test_shipped_functions_count_in_a_users_function(folder):
    (folder / "rows_a.py").write_text("from foundry_ext.data.prompts import gsm8k as f\n")
    assert module_sources(function()).keys() == {prompts.__name__}
    (folder / "wraps_a.py").write_text(
        "from foundry_ext.data import prompts\ndef f(row):\n    return prompts.gsm8k(row)\n"
    )
    found = module_sources(importlib.import_module("wraps_a").f)
    assert found.keys() == {"wraps_a", prompts.__name__}


@pytest.mark.parametrize("form", ["partial", "wrapped", "instance", "method"])
def test_functions_of_every_form_have_a_source(folder, form: str):
    source = {
        "partial": "import functools\ndef g(n, row): return row\nf = functools.partial(g, 1)\n",
        "wrapped": (
            "import functools\ndef d(g):\n    @functools.wraps(g)\n    def w(row): return g(row)\n"
            "    return w\n@d\ndef f(row): return row\n"
        ),
        "instance": "class C:\n    def __call__(self, row): return row\nf = C()\n",
        "method": "class C:\n    def g(self, row): return row\nf = C().g\n",
    }[form]
    (folder / "rows_a.py").write_text(source)
    assert module_sources(function())["rows_a"].decode() == source
    assert module_sources(None) == module_sources(len) == {}


def test_a_template_in_another_module_renews_the_cache(folder, tokenizer, monkeypatch):
    """The edited template is trained on, and the fingerprint shows it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "rows.jsonl").write_text('{"prompt": "b", "response": "c"}\n' * 3)
    dataset = {"hf_name": str(folder / "rows.jsonl"), "split": "train", "max_seq_len": 32}
    found = []
    for word in ("a ", "z "):
        _forget()
        (folder / "helpers_a" / "other.py").write_text(f"WORD = {word!r}\n")
        documents = build(
            tokenizer, {**dataset, "preprocessing_fn": "rows_a:f"}
        ).dataloader.dataset.documents
        found.append(tokenizer.decode(documents[0].input_ids))
    assert [text.replace(" ", "")[:3] for text in found] == ["axb", "zxb"]


# --- nulls and numbers ----------------------------------------------------------------------------

SHIPPED = {
    prompts.gsm8k: {"question": "q", "answer": "a"},
    prompts.metamathqa: {"query": "q", "response": "a"},
    prompts.magicoder: {"instruction": "q", "response": "a"},
}


@pytest.mark.parametrize("value", [None, 42, 42.0, True, ["a"]], ids=repr)
@pytest.mark.parametrize("function", SHIPPED, ids=lambda one: one.__name__)
def test_shipped_functions_refuse_what_is_not_text(function, value):
    row = SHIPPED[function]
    assert function(row)["response"].strip() == "a"
    for column in row:
        with pytest.raises(UserError, match=f"column '{column}' is (null|.*{value!r}).*, not text"):
            function({**row, column: value})


def _format(row):
    return {"prompt": row["q"], "response": f" {row['a']}"}


def _chat(row):
    contents = [("user", row["q"]), ("assistant", f"{row['a']}")]
    return {"messages": [{"role": role, "content": content} for role, content in contents]}


@pytest.mark.parametrize("function", [_format, _chat])
def test_a_null_that_a_users_function_writes_as_text_is_refused(function):
    with pytest.raises(UserError, match="null as the text 'None'; 'a' is null, or missing"):
        format_row(function, {"q": "None of them?", "a": None})
    kept = {"q": "None of them?", "a": "None"}
    assert format_row(function, kept) == function(kept)


WRITES = {
    "in an object": (lambda row: f" {row['qa']['a']}", {"qa": {"q": "x", "a": None}}, "qa.a"),
    "in a list": (lambda row: " ".join(map(str, row["a"])), {"a": ["x", None]}, r"a\[1\]"),
    "in objects of a list": (
        lambda row: "\n".join("- {}".format(one["b"]) for one in row["a"]),
        {"a": [{"b": "x"}, {"b": None}]},
        r"a\[1\].b",
    ),
    "a whole list": (lambda row: f"{row['a']}", {"a": ["x", None]}, r"a\[1\]"),
    "cut": (lambda row: (str(row["a"]) + "x" * 99)[:20], {"a": None}, "a"),
    "with %": (lambda row: "%s" % row["a"], {"a": None}, "a"),  # noqa: UP031
    "beside one that is handled": (
        lambda row: f"{'None given' if row['c'] is None else row['c']}, {row['a']}",
        {"c": None, "a": None},
        "a",
    ),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_null_inside_a_value_that_becomes_text_is_refused(case: str):
    function, row, name = WRITES[case]
    with pytest.raises(UserError, match=f"null as the text 'None'; '{name}' is null"):
        format_row(lambda row: {"prompt": "None?", "response": function(row)}, row)


HANDLES = [
    lambda row: "None given" if row["c"] is None else row["c"],
    lambda row: "None" if row["c"] is None else row["c"],
    lambda row: "None given" if row["c"] is None else f"{row['c']}",
    lambda row: f"Context: {row['c']}" if row["c"] else "x = None",
    lambda row: row["c"] or "None",
    lambda row: "None" if row["c"] is None else row["c"]["missing"],
    lambda row: "None of " + ", ".join(one for one in row["l"] if one is not None),
    lambda row: f"None {json.dumps(row)}",
]


@pytest.mark.parametrize("function", HANDLES)
def test_a_function_that_handles_null_may_write_none(function):
    row = {"c": None, "l": ["x", None]}
    assert format_row(function, row) == function(row)


def test_nulls_that_a_function_handles_are_its_own():
    def handles(row):
        if row.pop("a") is None:
            return {"prompt": row["q"], "response": "no answer"}
        raise AssertionError

    def names(row):
        return {"prompt": row["q"], "response": row["a"] or "None"}

    row = {"q": "None?", "a": None}
    assert format_row(handles, dict(row))["response"] == "no answer"
    assert format_row(names, row)["response"] == "None"
    with pytest.raises(KeyError):
        format_row(lambda row: row["b"], dict(row))


@pytest.mark.parametrize("answer", [None, 42])
def test_the_row_is_named(tmp_path, tokenizer, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": answer}) + "\n")
    dataset = {"hf_name": str(path), "split": "train", "max_seq_len": 32}
    with pytest.raises(UserError, match=r"row 0: column 'answer' is .*, not text"):
        build(tokenizer, {**dataset, "preprocessing_fn": "foundry_ext.data.prompts:gsm8k"})
    mapping = {"prompt": "question", "response": "answer"}
    with pytest.raises(UserError, match="row 0: InvalidResponseTypeError"):
        build(tokenizer, {**dataset, "preprocessing_fn": mapping})


@pytest.mark.parametrize(("tags", "is_left"), [([[], []], False), ([[], [None]], True)])
def test_a_column_of_lists_without_items_is_an_empty_one(tmp_path, tags, is_left: bool):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "tags": one}) + "\n" for one in tags))
    rows = without_empty_columns(load_rows(str(path), "train"))
    assert ("tags" in rows.column_names) == is_left


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_column_without_anything_in_it_does_not_hurt(tmp_path, tokenizer, suffix: str):
    rows = [{"prompt": "a", "response": "b", "note": None}] * 3
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        path.write_text("prompt,response,,note\n" + "a,b,,\n" * 3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"hf_name": str(path), "split": "train", "max_seq_len": 32}
    assert build(tokenizer, dataset).dataloader.dataset.documents.counts["kept"] == 3
    more = "a,b,,x\n" if suffix == "csv" else json.dumps({**rows[0], "note": "x"})
    path.write_text(path.read_text() + more)
    with pytest.raises(UserError, match="row 0: UnknownExampleTypeError"):
        build(tokenizer, dataset)


def test_columns_too_many_are_named_with_those_allowed(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "score": 1}\n' * 2)
    dataset = {"hf_name": str(path), "split": "train", "max_seq_len": 32}
    with pytest.raises(UserError) as error:
        build(tokenizer, dataset)
    for part in (
        "columns 'prompt', 'response', 'score';",
        "response or completion",
        "messages alone",
    ):
        assert part in str(error.value)
    assert "remove the others, or set preprocessing_fn" in str(error.value)
    assert "{" not in str(error.value)
    path.write_text('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(UserError, match=r"row 0: UnknownExampleTypeError: .*'role'"):
        build(tokenizer, dataset)


@pytest.mark.parametrize(
    ("separator", "hint"), [(";", "{sep: ';'}"), ("\t", '{sep: "\\t"}'), ("|", "{sep: '|'}")]
)
def test_another_separator_is_named_with_the_key_that_sets_it(tmp_path, tokenizer, separator, hint):
    path = tmp_path / "rows.csv"
    dataset: dict[str, Any] = {"hf_name": str(path), "split": "train", "max_seq_len": 32}
    gsm8k = {"preprocessing_fn": "foundry_ext.data.prompts:gsm8k"}
    cases = [
        ("packed_finetuning", ("prompt", "response"), {}, "a"),
        ("packed_finetuning", ("prompt", "response"), {}, "a, with a comma"),
        ("packed_finetuning", ("question", "answer"), gsm8k, "a"),
        ("packed_text", ("text", "id"), {}, "a"),
    ]
    for name, columns, more, cell in cases:
        path.write_text(f"{separator.join(columns)}\n{cell}{separator}b\n")
        with pytest.raises(UserError) as error:
            build(tokenizer, {**dataset, **more}, name=name)
        assert f"hf_kwargs: {hint}" in str(error.value)
        way_out = yaml.safe_load(str(error.value).rpartition("hf_kwargs: ")[2])
        loader = build(tokenizer, {**dataset, **more, "hf_kwargs": way_out}, name=name)
        assert loader.dataloader.dataset.documents.counts["kept"] == 1


@pytest.mark.parametrize("values", [(0, 0.0), (False, 0), ([0], [0.0])])
def test_a_column_of_zeros_is_not_an_empty_one(values):
    table = pa.table({"prompt": ["a"] * 2, "x": list(map(json.dumps, values)), "e": ["{}", "[]"]})
    features = {"prompt": datasets.Value("string"), "x": JsonValue(), "e": JsonValue()}
    rows = datasets.Dataset(table, datasets.DatasetInfo(features=datasets.Features(features)))
    assert without_empty_columns(rows).column_names == ["prompt", "x"]


def test_a_null_response_is_named_for_what_it_is(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": null}\n' * 2)
    dataset = {"hf_name": str(path), "split": "train", "max_seq_len": 32}
    with pytest.raises(UserError, match=r"row 0: .*; its 'response' is null, or missing"):
        build(tokenizer, dataset)
