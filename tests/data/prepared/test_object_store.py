"""Prepared data in an object store, with moto's server in place of S3."""

import pytest

from foundry_ext.data.prepared.merging import Part, merge_parts
from foundry_ext.data.prepared.preparing import prepare
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.utils.errors import UserError
from tests.data.kit import assert_batches_equal, build, walk

BUCKET = "bucket"


@pytest.fixture
def store(monkeypatch):
    """Return a URI in an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}/some/edu"
    server.stop()


@pytest.fixture
def section(make_rows, write_jsonl, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": row["prompt"] + row["response"]} for row in make_rows(80)]
    return {
        "hf_name": str(write_jsonl(rows)),
        "split": "train",
        "max_seq_len": 32,
        "pack_tokens": 64,
        "shuffle": True,
        "window": 10,
    }


def make(tokenizer, section, out, **options):
    return prepare(
        {key: value for key, value in section.items() if key != "window"},
        tokenizer,
        name="packed_text",
        tokenizer_name="tiny",
        out=out,
        workers=1,
        shard_bytes=500,
        **options,
    )


def test_prepared_in_parts_and_trained_from_a_cache(store, section, tokenizer, tmp_path):
    for number in (2, 1):
        make(tokenizer, section, store, part=Part(number, 2))
    shards = merge_parts(Storage(store))
    make(tokenizer, section, str(tmp_path / "folder"))
    limit = sum(shard.bytes for shard in shards) // 2
    remote = {"prepared": store, "local": str(tmp_path / "local"), "cache_limit": limit}
    from_store = build(tokenizer, {**section, **remote}, name="packed_text")
    in_place = build(
        tokenizer, {**section, "prepared": str(tmp_path / "folder")}, name="packed_text"
    )
    assert_batches_equal(walk(from_store), walk(in_place))
    here = list((tmp_path / "local" / "shards").glob("*.mds"))
    assert sum(path.stat().st_size for path in here) <= limit
    assert len(here) < len(shards)


def test_finished_shards_are_not_sent_again(store, section, tokenizer, monkeypatch):
    make(tokenizer, section, store)
    sent = []
    put = Storage.put
    monkeypatch.setattr(
        Storage, "put", lambda self, path, name: (sent.append(name), put(self, path, name))
    )
    make(tokenizer, section, store)
    assert not [name for name in sent if name.startswith("shards/")]


def test_missing_data_and_bucket(store, section, tokenizer, tmp_path):
    local = {"local": str(tmp_path / "local")}
    with pytest.raises(UserError, match=r"s3://bucket/other holds no prepared data"):
        build(
            tokenizer, {**section, **local, "prepared": f"s3://{BUCKET}/other"}, name="packed_text"
        )
    with pytest.raises(UserError, match=r"s3://nowhere/edu: .*check the bucket's name, the crede"):
        make(tokenizer, section, "s3://nowhere/edu")
