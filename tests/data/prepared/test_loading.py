"""Loaders of prepared data: settings, mixtures, ranks, and runs that go on."""

import pytest

from foundry_ext.data.prepared.preparing import prepare
from foundry_ext.utils.errors import UserError
from tests.data.kit import assert_batches_equal, build, walk


@pytest.fixture
def section(make_rows, write_jsonl, tokenizer, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    for name, seed, number in (("main", 0, 120), ("more", 1, 60)):
        rows = [{"text": row["prompt"] + row["response"]} for row in make_rows(number, seed)]
        source = {"hf_name": str(write_jsonl(rows, f"{name}.jsonl")), "split": "train"}
        prepare(
            {**source, "max_seq_len": 32},
            tokenizer,
            name="packed_text",
            tokenizer_name="tiny",
            out=str(tmp_path / name),
            workers=1,
            shard_bytes=500,
        )
    return {
        "prepared": str(tmp_path / "main"),
        "max_seq_len": 32,
        "pack_tokens": 64,
        "shuffle": True,
        "window": 20,
    }


def load(tokenizer, section, name="packed_text", **options):
    return build(tokenizer, section, name=name, **options)


def test_epochs_are_shuffled_and_the_same_every_time(tokenizer, section):
    first, again = (walk(load(tokenizer, section)) for _ in range(2))
    assert_batches_equal(first, again)
    other = walk(load(tokenizer, section), epoch=1)
    assert len(other) == len(first)
    tokens = [batch[0]["input_ids"].tolist() for batch in first]
    assert tokens != [batch[0]["input_ids"].tolist() for batch in other]


def test_worker_processes_read_the_same(tokenizer, section, tmp_path):
    section = {**section, "local": str(tmp_path / "local")}
    assert_batches_equal(
        walk(load(tokenizer, section, num_workers=2)), walk(load(tokenizer, section))
    )


@pytest.mark.parametrize("at", [1, 7, 15])
def test_run_goes_on_where_it_stopped(tokenizer, section, at):
    whole = walk(load(tokenizer, section), epoch=1)
    stopped = load(tokenizer, section)
    stopped.dataloader.batch_sampler.set_epoch(1)
    batches = iter(stopped.dataloader)
    for _ in range(at):
        next(batches)
    state = stopped.dataloader.dataset.state_dict()
    resumed = load(tokenizer, section, size=1) if at == 15 else load(tokenizer, section)
    resumed.dataloader.dataset.load_state_dict(state)
    rest = walk(resumed, epoch=1)
    if at == 15:  # with half as many packs per batch
        rest = [[a, b] for [a], [b] in zip(rest[::2], [*rest, whole[-1][1:]][1::2], strict=False)]
    assert_batches_equal(rest, whole[at:])


def test_second_start_counts_nothing(tokenizer, section, monkeypatch):
    walk(load(tokenizer, section))

    def fail(*_, **__):
        raise AssertionError("counted again")

    monkeypatch.setattr("foundry_ext.data.prepared.plan_cache.shared_out", fail)
    loader = load(tokenizer, section)
    packed = []
    sampler = loader.dataloader.dataset.sampler
    pack = sampler._pack
    monkeypatch.setattr(sampler, "_pack", lambda *args: packed.append(args) or pack(*args))
    sampler.batch(len(sampler) // 2)
    assert len(packed) <= 2 < len(sampler.plan(0).windows)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"window": 21}, "window"),
        ({"pack_tokens": 65}, "pack_tokens"),
        ({"shuffle_seed": 1}, "shuffle_seed"),
    ],
)
def test_other_plan_is_refused_on_resumption(tokenizer, section, change, part):
    state = load(tokenizer, section).dataloader.dataset.state_dict()
    with pytest.raises(UserError, match=rf"other data or packing \({part}"):
        load(tokenizer, {**section, **change}).dataloader.dataset.load_state_dict(state)


def amounts(tokenizer, entries) -> list[tuple[float, int]]:
    dataset = load(tokenizer, entries).dataloader.dataset
    return [(source["passes"], source["tokens"]) for source in dataset.description]


def test_mixtures(tokenizer, section, tmp_path):
    main, more = (str(tmp_path / name) for name in ("main", "more"))
    common = {key: value for key, value in section.items() if key != "prepared"}
    (_, whole), (_, small) = amounts(
        tokenizer, {**common, "datasets": [{"prepared": main}, {"prepared": more}]}
    )
    for amount, tokens in (
        ({"repeat": 2.5}, 2.5 * small),
        ({"choose": f"{small // 3}tok"}, small // 3),
        ({"share": 0.2}, 0.25 * whole),
    ):
        entries = [{"prepared": main}, {"prepared": more, **amount}]
        loader = load(tokenizer, {**common, "datasets": entries})
        dataset = loader.dataloader.dataset
        assert dataset.description[1]["tokens"] == pytest.approx(tokens, abs=1)
        walked = sum(pack["num_tokens"] for batch in walk(loader) for pack in batch)
        shards = len(dataset.documents.sources[1].index.shards)
        assert abs(walked - whole - tokens) <= 32 * shards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prepared": "nowhere"}, "nowhere holds no prepared data, no prepared.json; make it with"),
        ({"prepared": "s3://b/edu"}, r"s3://b/edu is fetched while training; set dataset\.local"),
        ({"prepared": 5}, "dataset.prepared: 5 is no place"),
        ({"window": 0}, "dataset.window: 0 must be a whole number"),
        ({"cache_limit": "1gb"}, "cache_limit needs dataset.local"),
        ({"cache_limit": "lots", "local": "x"}, "cache_limit: 'lots' is no size"),
        ({"cache_limit": 100, "local": "x"}, "cache_limit: 100 bytes do not hold two windows"),
        ({"overlong": "cut"}, "overlong: 'cut'; choose one of truncate, split, drop, error"),
        ({"overlong": "error"}, r"a row has \d+ tokens, more than max_seq_len 32"),
        ({"text_key": "content"}, "text_key: 'content', but .*main was prepared with 'text'"),
        ({"split": "test"}, "split: 'test', but .*main was prepared with 'train'; leave split out"),
        ({"datasets": [{"prepared": "x"}]}, "dataset.prepared does not go with dataset.datasets"),
        (
            {"holdout": {"by": "id", "fraction": 0.1, "part": "train"}},
            "holdout: .*prepared with Non",
        ),
        ({"hf_kwargs": {"revision": "a"}}, "hf_kwargs: .* was prepared with {}"),
        ({"local": 5}, "dataset.local: 5 is no folder"),
    ],
)
def test_bad_settings(tokenizer, section, change, message):
    with pytest.raises(UserError, match=message):
        walk(load(tokenizer, {**section, **change}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [{}, {"hf_name": "a.jsonl", "split": "train"}],
            r"datasets\[1\] is not prepared, and othe",
        ),
        ([{"share": 0.5}], "every source has a share"),
        ([{}, {"share": 0.5}, {"share": 0.5}], "shares add up to 1, which leaves nothing"),
        ([{}, {"share": 1.5}], r"datasets\[1\].share: 1.5 must be below 1"),
        ([{}, {"share": 0.5, "repeat": 2}], "give one of repeat and share, not both"),
        ([{"repeat": 0}], "repeat: 0 must be a number above 0, passes in an epoch"),
        ([{"choose": "many"}], "choose: 'many' must be a number of tokens, such as"),
        ([{"weight": 2}], r"unknown key dataset.datasets\[0\].weight; the keys are choose, over"),
    ],
)
def test_bad_mixtures(tokenizer, section, entries, message):
    main = section.pop("prepared")
    entries = [entry if "hf_name" in entry else {"prepared": main, **entry} for entry in entries]
    with pytest.raises(UserError, match=message):
        load(tokenizer, {**section, "datasets": entries})


def test_other_tokenizer_is_refused(tokenizer, section):
    tokenizer.chat_template = "other"
    with pytest.raises(UserError, match="was tokenised with another tokenizer or chat template"):
        load(tokenizer, section)


def test_damaged_sizes_are_noticed(tokenizer, section, tmp_path):
    path = tmp_path / "main" / "lengths.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"lengths.npy: it is not the file that prepared.json nam"):
        load(tokenizer, section)


def test_rows_with_prompts_need_the_other_loader(
    tokenizer, make_rows, write_jsonl, tmp_path, section
):
    rows = {"hf_name": str(write_jsonl(make_rows(9), "p.jsonl")), "split": "train"}
    prepare(
        {**rows, "max_seq_len": 32},
        tokenizer,
        name="packed_finetuning",
        tokenizer_name="tiny",
        out="prompts",
        workers=1,
    )
    section["prepared"] = "prompts"
    with pytest.raises(UserError, match=r"prompts has rows with prompts; set train_loader\.name"):
        load(tokenizer, section)
    assert walk(load(tokenizer, section, "packed_finetuning"))


def test_parts_of_a_source_move_on_through_the_sampler(tokenizer, section, tmp_path):
    """Each epoch has other documents, and after 1 / part epochs all have been trained on."""
    main, more = (str(tmp_path / name) for name in ("main", "more"))
    common = {key: value for key, value in section.items() if key != "prepared"}
    entries = [{"prepared": main}, {"prepared": more, "repeat": 0.25}]
    loader = load(tokenizer, {**common, "datasets": entries}, size=1)
    dataset = loader.dataloader.dataset
    seen, per_epoch = set(), []
    for epoch in range(4):
        dataset.sampler.set_epoch(epoch)
        batches = [pack for batch in dataset.sampler for pack in batch]
        assert len(batches) <= len(dataset.sampler)
        named = [int(name) for pack in batches for name in pack]
        drawn = {name for name in named if dataset.documents.locate(name)[0] == 1}
        assert len(named) == len(set(named))
        per_epoch.append(drawn)
        seen |= drawn
    assert per_epoch[0] != per_epoch[1]
    whole = load(tokenizer, {**common, "datasets": [{"prepared": main}, {"prepared": more}]})
    used = whole.dataloader.dataset.documents.used_documents()
    names = {int(name) for block in used for name in block}
    assert seen == {name for name in names if dataset.documents.locate(name)[0] == 1}


def test_counts_of_small_parts(tokenizer, section):
    """Documents of a length may be fewer than one per epoch; their sum is not."""
    common = {key: value for key, value in section.items() if key != "prepared"}
    entries = [{"prepared": section["prepared"], "repeat": 0.3}]
    dataset = load(tokenizer, {**common, "datasets": entries}).dataloader.dataset
    epochs = []
    for epoch in range(10):
        dataset.sampler.set_epoch(epoch)
        packs = [pack for batch in dataset.sampler for pack in batch]
        epochs.append(sum(len(pack) for pack in packs))
    assert sum(epochs) / 10 == pytest.approx(dataset.num_documents, rel=0.05)


def test_every_window_opens_its_shards_once(tokenizer, section, monkeypatch):
    from foundry_ext.data.prepared.local_shards import LocalShards

    opened = []
    open_shard = LocalShards.open_shard

    def noting(self, shard):
        opened.append(shard)
        return open_shard(self, shard)

    monkeypatch.setattr(LocalShards, "open_shard", noting)
    loader = load(tokenizer, section)
    walk(loader)
    shards = len(loader.dataloader.dataset.documents.sources[0].index.shards)
    assert len(opened) == shards


def test_loader_goes_to_a_spawned_worker(tokenizer, section, tmp_path):
    import pickle

    section = {**section, "local": str(tmp_path / "local")}
    dataset = load(tokenizer, section).dataloader.dataset
    copy = pickle.loads(pickle.dumps(dataset))
    pack = dataset.sampler.batch(0)[0]
    assert copy[pack]["input_ids"].tolist() == dataset[pack]["input_ids"].tolist()


def test_evaluation_on_the_same_shards_is_refused(tokenizer, section, tmp_path):
    from foundry_ext.training.data_checks import refuse_training_documents

    trained = load(tokenizer, {**section, "local": str(tmp_path / "local")}).dataloader.dataset
    evaluated = load(tokenizer, {**section, "max_seq_len": 30}).dataloader.dataset
    with pytest.raises(UserError, match=r"eval: \d+ of its shards are those of train_loader"):
        refuse_training_documents("eval", evaluated, trained)


def test_edited_preprocessing_is_noticed(tokenizer, make_rows, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = "def change(row):\n    return {**row, 'response': row['response'] + 'a'}\n"
    (tmp_path / "own_change.py").write_text(code, encoding="utf-8")
    section = {"hf_name": str(write_jsonl(make_rows(9))), "split": "train", "max_seq_len": 64}
    section["preprocessing_fn"] = "own_change:change"
    prepare(section, tokenizer, name="packed_finetuning", tokenizer_name="t", out="o", workers=1)
    assert walk(load(tokenizer, {**section, "prepared": "o"}, "packed_finetuning"))
    (tmp_path / "own_change.py").write_text(code.replace("'a'", "'b'"), encoding="utf-8")
    with pytest.raises(UserError, match="own_change:change has changed since o was prepared"):
        load(tokenizer, {**section, "prepared": "o"}, "packed_finetuning")
