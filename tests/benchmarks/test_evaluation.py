"""The benchmark of evaluations, on a tiny shape and random rows."""

import json

import pytest
from transformers import LlamaConfig

from benchmarks import evaluation, evaluation_cases


def test_every_case_agrees_with_transformers(tmp_path, monkeypatch, capsys):
    LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(evaluation, "CONFIGS", tmp_path)
    monkeypatch.setattr(evaluation, "MOST_NEW_TOKENS", 3)
    file = tmp_path / "report.json"
    words = ["--shape", "tiny", "--items", "4", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["benchmarks/evaluation.py", *words, "--json", str(file)])
    evaluation.main()
    table = capsys.readouterr().out
    results = {one["case"]: one for one in json.loads(file.read_text())["results"]}
    assert len(results) == len(evaluation_cases.random_cases(256, 4))
    for name, result in results.items():
        for agreement in result["agreement"].values():
            if "other" in agreement:
                assert agreement["other"] == 0, name
            else:
                assert agreement["absolute"] < 1e-3 and agreement["relative"] < 1e-4, name
        assert f"| {name} |" in table
    assert results["ARC, 5 shots"]["tokens"] > results["ARC, 5 shots"]["documents"] * 50


def test_real_rows_need_a_tokenizer(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/evaluation.py", "--data", "somewhere"])
    with pytest.raises(SystemExit):
        evaluation.main()
