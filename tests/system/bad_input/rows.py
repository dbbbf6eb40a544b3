"""Cases of bad files of rows, and of how they are cut and packed."""

from typing import Any

from tests.system.bad_input.bench import Bench
from tests.system.bad_input.case import Case, change, data, rows

ROW = {"prompt": "one", "response": "two three"}
GOOD = '{"prompt": "one", "response": "two"}\n'
LONG = {"prompt": "one", "response": "seven " * 200}
_WAY_OUT = "set preprocessing_fn to a function that makes such rows"
_NOT_FOUND = ("give hf_name a local", ".jsonl", "a folder of them, or a name on the hub")
_NOTHING_LEFT = "left to train on"


def _folder(bench: Bench) -> None:
    (bench.folder / "folder").mkdir()
    bench.data(hf_name=str(bench.folder / "folder"))


def _kept(**counts: int):
    def holds(bench: Bench) -> None:
        found = bench.record()["data"]["train"]["counts"]
        assert {name: found[name] for name in counts} == counts, found

    return holds


def _same_documents(bench: Bench) -> None:
    """Evaluate on a copy of the training rows under another name."""
    copy = bench.folder / "copy.jsonl"
    copy.write_bytes(bench.world.rows.read_bytes())
    _evaluate_on(copy)(bench)


def _evaluate_on(path: Any = None):
    def spoil(bench: Bench) -> None:
        loader = {**bench.config["train_loader"]}
        loader["dataset"] = {**loader["dataset"], "hf_name": str(path or bench.world.rows)}
        bench.change(eval_loader=loader, eval_interval=1)

    return spoil


FILES = [
    Case("missing file", data(hf_name="no.jsonl"), ("dataset file no.jsonl does not exist (in ",)),
    Case("missing folder", data(hf_name="/no/folder"), ("dataset /no/folder", *_NOT_FOUND)),
    Case("empty file", rows(b""), ("rows.jsonl is empty", "write rows to it")),
    Case("blank file", rows(b"\n \n"), ("rows.jsonl is empty", "write one row per line")),
    Case("empty csv", rows(b"", "r.csv"), ("r.csv is empty", "write rows to it")),
    Case("empty folder", _folder, ("folder holds no data", *_NOT_FOUND)),
    Case("unknown suffix", rows(GOOD, "rows.txt"), ("rows.txt holds no data", *_NOT_FOUND)),
    Case("no parquet", rows(b"PAR", "r.parquet"), ("r.parquet", "3 bytes")),
    Case(
        "broken JSON",
        rows(GOOD * 2 + '{"prompt": "one", "response"\n' + GOOD),
        ("rows.jsonl, line 3: not JSON", "Expecting ':' delimiter at character 29", "correct or"),
    ),
    Case("cut JSON", rows(GOOD + '{"prompt": "on'), ("line 2: not JSON", '\'{"prompt": "on\'')),
    Case(
        "no objects",
        rows(GOOD + "7\n"),
        ("line 2: b'7", "does not begin a JSON object", "one row per line"),
    ),
    Case(
        "nested beyond reading",
        rows('{"prompt": ' + "[" * 3000 + "]" * 3000 + "}\n"),
        ("line 1: nested too deeply",),
    ),
    Case(
        "double key",
        rows(GOOD + '{"prompt": "a", "prompt": "b"}'),
        ("line 2: key 'prompt' appears twice",),
    ),
    Case(
        "double column",
        rows("prompt,prompt,response\na,b,c\n", "r.csv"),
        ("row 0", "prompt.1", _WAY_OUT),
    ),
    Case(
        "wrong columns", rows([{"question": "a", "answer": "b"}]), ("row 0", "'question'", _WAY_OUT)
    ),
    Case(
        "no response anywhere",
        rows([{"prompt": "a"}] * 3),
        ("row 0", "columns 'prompt';", _WAY_OUT),
    ),
    Case("no response in a row", rows([ROW, {"prompt": "a"}]), ("row 1", "NoneType", _WAY_OUT)),
    Case("prompt null", rows([ROW, ROW, {**ROW, "prompt": None}]), ("row 2", "prompt", _WAY_OUT)),
    Case("a column too many", rows([{**ROW, "id": 7}]), ("row 0", "'id'", _WAY_OUT)),
    Case("numbers", rows([{"prompt": 1, "response": 2}]), ("row 0", "'int'", _WAY_OUT)),
    Case(
        "mixed types",
        rows([ROW, ROW, {**ROW, "response": 7}]),
        ("line 3: 'response' is a number, '7', but text in line 1", "correct or remove"),
    ),
    Case(
        "mixed schemas",
        rows([ROW, {"messages": [{"role": "user"}]}]),
        ("row 0", "it has no 'messages', which others have", _WAY_OUT),
    ),
    Case(
        "invalid UTF-8",
        rows(GOOD.encode() + b'{"prompt": "a\xff", "response": "b"}\n'),
        ("line 2: byte 14, 0xff, is not UTF-8", "write the file in that encoding"),
    ),
    Case("UTF-16", rows(GOOD.encode("utf-16")), ("line 1: byte 1, 0xff, is not UTF-8",)),
    Case(
        "NUL byte",
        rows(GOOD.encode() + b'{"prompt": "a\0", "response": "b"}\n'),
        ("line 2: not JSON, Invalid control character at character 14", "correct or remove"),
    ),
    Case("a chat of one", rows([{"messages": [{"role": "user"}]}]), ("row 0", "two messages")),
    Case("split", data(split="train[5"), ("train[5", "train.jsonl")),
    Case("no split", data(split=None), ("set split, e.g. split: train",)),
    Case(
        "evaluation file is missing",
        _evaluate_on("no.jsonl"),
        ("eval_loader (packed_finetuning)", "dataset file no.jsonl does not exist"),
    ),
    Case(
        "evaluation on the training file",
        _evaluate_on(),
        ("eval_loader.dataset", "is what train_loader trains on", "holdout"),
    ),
    Case(
        "evaluation on the training rows",
        _same_documents,
        ("eval_loader eval: its documents are those of train_loader", "holdout"),
    ),
]

NOTHING_LEFT = [
    Case("responses empty", rows([{**ROW, "response": ""}] * 4), ("4 dropped_empty", "lack a pr")),
    Case("all dropped", rows([LONG] * 3, overlong="drop"), (_NOTHING_LEFT, "3 dropped_overlong")),
    Case(
        "prompts fill all",
        rows([{"prompt": LONG["response"], "response": "a"}] * 3),
        (_NOTHING_LEFT, "3 dropped_no_loss", "max_seq_len 32", "overlong: truncate"),
    ),
    Case(
        "overlong is an error",
        rows([ROW, LONG], overlong="error"),
        ("row 1 has", "more than max_seq_len 32", "set overlong to truncate, split or drop"),
    ),
    Case(
        "all overlong is an error",
        rows([LONG] * 3, overlong="error"),
        ("row 0 has", "more than max_seq_len 32", "set overlong to truncate, split or drop"),
    ),
]

KEYS = [
    Case("capacity below", data(pack_tokens=16), ("pack_tokens: 16", "max_seq_len 32", "raise")),
    Case("capacity 1", data(pack_tokens=1), ("pack_tokens: 1 is below max_seq_len 32", "raise")),
    Case("capacity -64", data(pack_tokens=-64), ("pack_tokens: -64 is below", "raise pack_tokens")),
    Case("capacity huge", data(pack_tokens=10**12), ("pack_tokens: 1000000000000", "at most")),
    Case("capacity text", data(pack_tokens="8k"), ("pack_tokens: '8k'", "whole number of tokens")),
    Case("capacity true", data(pack_tokens=True), ("pack_tokens: True", "whole number of tokens")),
    Case("document of 1", data(max_seq_len=1), ("max_seq_len: 1 leaves no token to predict",)),
    Case("document of -5", data(max_seq_len=-5), ("max_seq_len: -5 leaves no token to predict",)),
    Case("document of text", data(max_seq_len="x"), ("dataset.max_seq_len", "'x'", "whole number")),
    Case(
        "document beyond the positions",
        data(max_seq_len=4000, pack_tokens=4000),
        ("max_seq_len: 4000 is more than the model's 128 positions", "lower it"),
    ),
    Case("packing_ratio", data(packing_ratio=4), ("packing_ratio by dataset.pack_tokens",)),
    Case("overlong", data(overlong="cut"), ("overlong: 'cut'", "truncate, split, drop, error")),
    Case("shuffle", data(shuffle="x"), ("dataset.shuffle: 'x'", "neither true nor false")),
    Case("shuffle_seed", data(shuffle_seed="x"), ("dataset.shuffle_seed: 'x'", "whole number")),
    Case(
        "eval_packs", data(eval_packs=0), ("dataset.eval_packs: 0", "must be a whole number from 1")
    ),
    Case("unknown key", data(pack_token=4), ("dataset.pack_token, did you mean 'pack_tokens'",)),
    Case("target_prompts", data(target_prompts="some"), ('"all", "none"', "'some'")),
    Case("no module", data(preprocessing_fn="no.such:f"), ("'no.such:f'", "write module:function")),
    Case(
        "no function",
        data(preprocessing_fn="foundry_ext.data.prompts:no"),
        ("preprocessing_fn: 'foundry_ext.data.prompts:no'", "no attribute 'no'", "write module:"),
    ),
    Case(
        "function of other rows",
        data(preprocessing_fn="foundry_ext.data.prompts:gsm8k"),
        ("row 0: KeyError: 'question'", "a row has a prompt and a response"),
    ),
    Case(
        "holdout",
        data(holdout={"by": "q", "fraction": 0.1, "part": "train"}),
        ("holdout: no column 'q'; there are prompt, response",),
    ),
    Case("loader", change(train_loader__name="packed_text2"), ("did you mean 'packed_text'",)),
]

ALLOWED = [
    Case("NUL in a text", rows([{"prompt": "a\0", "response": "\0"}] * 9), (), holds=_kept(kept=9)),
    Case(
        "a prompt is empty",
        rows([{**ROW, "prompt": ""}] + [ROW] * 9),
        ("9 kept, 1 dropped_empty", "an empty prompt or response; the first is row 0"),
        holds=_kept(kept=9, dropped_empty=1),
    ),
    Case(
        "a response is empty",
        rows([{**ROW, "response": ""}] + [ROW] * 9),
        ("9 kept, 1 dropped_empty",),
        holds=_kept(kept=9, dropped_empty=1),
    ),
    Case(
        "all are truncated",
        rows([LONG] * 9, overlong="truncate"),
        ("9 truncated", "tokens_cut"),
        holds=_kept(truncated=9),
    ),
    Case("all are split", rows([LONG] * 9, overlong="split"), (" split",)),
    Case(
        "a row of 10 MB",
        rows([{"prompt": "one", "response": "towards " * (10 * 2**20 // 8)}] + [ROW] * 9),
        ("9 kept, 1 truncated", "tokens_cut"),
        holds=_kept(kept=9, truncated=1),
    ),
]
