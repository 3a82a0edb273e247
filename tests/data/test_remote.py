"""Parquet behind URLs and on the hub: the rows of the files, fetched a row group at a time."""

import re

import hub_server
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizers import tiny

from jaxft.data import remote
from jaxft.data.rows import hub_dataset, read_rows
from jaxft.data.sft import Rows

COUNT, GROUP = 400, 100


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset of two training files of random text, which does not compress, and a test file."""
    rng = np.random.default_rng(0)
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name in ("train-0", "train-1", "test-0"):
        rows = [{"text": f"{name} {i} {rng.bytes(500).hex()}", "n": i} for i in range(COUNT)]
        table = pyarrow.Table.from_pylist(rows)
        path = tmp_path / "set" / "data" / f"{name}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=GROUP, compression="none")
    with hub_server.serve_dataset(tmp_path / "set", "org/set") as (endpoint, sent):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield tmp_path / "set" / "data", endpoint, sent


def test_rows_of_the_hub_are_those_of_its_files(hub):
    folder, endpoint, _ = hub
    expected = [r for name in ("train-0", "train-1") for r in read_rows(str(folder / f"{name}.parquet"))]
    for pattern in ("data/train-*", "data/train-?.parquet"):
        assert read_rows(f"hf://datasets/org/set/{pattern}") == expected
    assert (
        len(read_rows("hf://datasets/org/set")) == len(read_rows("hf://datasets/org/set/data")) == 3 * COUNT
    )
    assert hub_dataset("hf://datasets/org/set@main/data/*") == "org/set"
    assert read_rows(f"{endpoint}/content/data/test-0.parquet") == read_rows(str(folder / "test-0.parquet"))


def test_a_row_group_is_fetched_at_once_and_the_token_stays_with_the_hub(hub):
    folder, _, sent = hub
    size = (folder / "train-0.parquet").stat().st_size
    batches = remote.remote_batches(remote.remote_files("hf://datasets/org/set/data/train-0*")[0], 50)
    assert next(batches).num_rows == 50
    fetched = sum(count for path, _, count in sent if path.startswith("/content/"))
    assert fetched < size * GROUP / COUNT + 3 * 2**16 < size  # in blocks of 64 KiB, with the file's end
    batches.close()
    assert {key for path, key, _ in sent if path.startswith("/datasets/")} == {"Bearer hf_secret"}
    assert {key for path, key, _ in sent if path.startswith("/content/")} == {None}


def test_batches_are_those_of_the_file_and_a_warm_start_fetches_no_rows(hub, tmp_path):
    folder, _, sent = hub
    options = {"max_length": 256, "invalid": "drop"}
    local = Rows(str(folder / "test-0.parquet"), **options).open(tiny("chatml"), cache=tmp_path)
    for state in ("built", "found"):
        sent.clear()
        there = Rows("hf://datasets/org/set/data/test-*", **options).open(tiny("chatml"), cache=tmp_path)
        assert there.info.stats.cache == state and there.info.fingerprint == local.info.fingerprint
    assert sum(count for path, _, count in sent if path.startswith("/content/")) == 1
    assert there.row_names(0) == local.row_names(0)


def test_what_is_wrong_with_a_url_is_one_line(hub, monkeypatch):
    _, endpoint, _ = hub
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    for ref, error in (
        ("hf://datasets/org/set/data/valid-*", "no Parquet file of the dataset matches .*it has data/test-0"),
        ("hf://datasets/org/other", "not found on the hub"),
        ("hf://models/org/set", "is not of the form hf://datasets/org/name"),
        (f"{endpoint}/nothing.parquet", "the server refuses it .*404"),
        ("http://127.0.0.1:9/x.parquet", "cannot be fetched"),
        ("http://127.0.0.1:9/x.jsonl?download=true", "only Parquet files are read behind a URL; download"),
    ):
        with pytest.raises(ValueError, match=error) as raised:
            read_rows(ref)
        assert "\n" not in str(raised.value) and re.search(r"hf:|http:", str(raised.value))
