"""Parquet behind URLs and on the hub: the rows of the files, fetched a row group at a time."""

import io
import re
import time
from http.server import BaseHTTPRequestHandler

import hub_server
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizers import tiny

from jaxft.data.rows import mixture, remote_files
from jaxft.data.rows.dataset_rows import hub_dataset, read_rows
from jaxft.data.rows.remote_files import without_secrets
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
    batches = remote_files.remote_batches(remote_files.remote_files("hf://datasets/org/set/data/train-0*")[0])
    assert next(batches)[0].num_rows == GROUP
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
    monkeypatch.setattr(remote_files, "ATTEMPTS", 1)
    for ref, error in (
        ("hf://datasets/org/set/data/valid-*", "no Parquet file of the dataset matches .*it has data/test-0"),
        ("hf://datasets/org/other", "not found on the hub"),
        ("hf://models/org/set", "must be of the form hf://datasets/org/name"),
        (f"{endpoint}/nothing.parquet", "the server refuses it .*404"),
        ("http://127.0.0.1:9/x.parquet", "cannot be fetched"),
        ("http://127.0.0.1:9/x.jsonl?download=true", "only Parquet files are read behind a URL; download"),
    ):
        with pytest.raises(ValueError, match=error) as raised:
            read_rows(ref)
        assert "\n" not in str(raised.value) and re.search(r"hf:|http:", str(raised.value))


def parquet(tag):
    """A file of 2,000 rows in 4 groups, of the same size for tags of one length."""
    table = pyarrow.table({"text": [f"{tag} {i:05}" for i in range(2000)]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=500, compression="none", use_dictionary=False)
    return file.getvalue()


@pytest.fixture
def odd_server():
    """The address of a server whose answers depend on the first part of the path."""
    old, new, seen = parquet("old"), parquet("new"), []
    assert len(old) == len(new)

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.split("/")[1]
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            seen.append((kind, start))
            later = sum(known == kind for known, _ in seen) > 3  # after the footer and the first group
            if kind == "redirect":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                return self.end_headers()
            swapped = later and kind in ("swap", "dates")
            part, size = (new if swapped else old)[start : end + 1], len(old)
            version = "Tue" if swapped else "Mon"
            first = 0 if kind == "shifted" and start else start
            if kind == "grown" and later:
                size += 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{size}")
            if kind == "dates":
                self.send_header("Last-Modified", version)
            else:
                self.send_header("ETag", f'W/"{version}"' if kind == "weak" and later else f'"{version}"')
            if kind != "endless":
                self.send_header("Content-Length", str(1 << 40 if kind == "huge" else len(part)))
            self.end_headers()
            try:
                while kind in ("huge", "endless"):
                    self.wfile.write(b"x" * (1 << 16))
                for i in range(len(part) if kind == "drip" else 0):
                    self.wfile.write(part[i : i + 1])
                    time.sleep(0.05)
                self.wfile.write(part)
            except OSError:
                pass
            return None

        def log_message(self, *args):
            pass

    with hub_server.served(Server) as address:
        yield address


def test_a_file_that_changes_while_it_is_read_is_an_error(odd_server):
    for kind in ("swap", "dates", "grown"):
        with pytest.raises(ValueError, match=r"x\.parquet: the file changed while it was read"):
            read_rows(f"{odd_server}/{kind}/x.parquet")
    assert len(read_rows(f"{odd_server}/weak/x.parquet")) == 2000
    with pytest.raises(ValueError, match="sends bytes 0-"):
        read_rows(f"{odd_server}/shifted/x.parquet")


def test_a_response_has_a_limit_of_bytes_and_of_time(odd_server, monkeypatch):
    monkeypatch.setattr(remote_files, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(remote_files, "SLOWEST", 1 << 20)
    for kind, error in (
        ("huge", "the server sends more than the 1 bytes that were requested"),
        ("endless", "the server sends more than the 1 bytes that were requested"),
        ("drip", r"did not send \d+ bytes in 0 s; try again, or download"),
        ("redirect", r"redirect cannot be followed \(HTTP Error 302.*file:///etc/passwd.*download the file"),
    ):
        begin = time.monotonic()
        with pytest.raises(ValueError, match=error) as raised:
            read_rows(f"{odd_server}/{kind}/x.parquet")
        assert time.monotonic() - begin < 40 and "access" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/x.parquet?X-Amz-Signature=SECRET&a=b", "https://host/x.parquet?***"),
        ("data=a.jsonl:0.7,https://me:SECRET@h/b.parquet?sig=SECRET:0.3", "data=a.jsonl:0.7,https://***@h/b.parquet?***:0.3"),
        ("https://h/a.parquet?sig=SECRET:0.5, https://h/b.parquet", "https://h/a.parquet?***:0.5, https://h/b.parquet"),
        ("https://h/x.parquet?token=SECRET:31337", "https://h/x.parquet?***"),
        ("data 'https://h/x.parquet#SECRET': no", "data 'https://h/x.parquet#***': no"),
        ("(see HTTPS://h?q=SECRET.)", "(see HTTPS://h?***.)"),
        ("s3://bucket/runs?key=SECRET", "s3://bucket/runs?***"),
        ("my rows/a.jsonl,https://h/x.parquet?sv=1&spr=https,http&sig=SECRET", "my rows/a.jsonl,https://h/x.parquet?***"),
        ("https://h/a,<n>.parquet?sig=SECRET,b.jsonl:0.2", "https://h/a,<n>.parquet?***,b.jsonl:0.2"),
        ('["https://h/x?sig=SECRET","https://h/y#SECRET"]', '["https://h/x?***","https://h/y#***"]'),
        ("x_https://u:SECRET@h/x, HTTP:/h?SECRET", "x_https://***@h/x, HTTP:/h?***"),
        (f"https://u:{'SECRET' * 99}@h/x", "https://***@h/x"),
        ("https://h/a.parquet,hf://datasets/o/n@rev/train-?:0.5", "https://h/a.parquet,hf://datasets/o/n@rev/train-?:0.5"),
        ("hf://datasets/org/set/data/train-?.parquet", "hf://datasets/org/set/data/train-?.parquet"),
        ("data/rows.jsonl:0.3,org/set:train what? #1", "data/rows.jsonl:0.3,org/set:train what? #1"),
    ],
)  # fmt: skip
def test_what_is_shown_of_a_url_has_no_password_and_no_signature(text, shown):
    assert without_secrets(text) == shown == without_secrets(shown)


def test_names_of_urls_have_no_signature(hub):
    _, endpoint, _ = hub
    text = ",".join(f"{endpoint}/content/data/{n}-0.parquet?s=SECRET{n}" for n in ("train", "test"))
    assert mixture.source_names(text) == "train-0.parquet, test-0.parquet"
    assert mixture.sources_with_metrics(text) == ("train-0", "test-0")
    names = mixture.sources_with_metrics(text.replace("train-0", "test-0").replace("/data/", "/other/", 1))
    assert len({*names}) == 2 and "SECRET" not in "".join(names)
    with pytest.raises(ValueError, match="give the whole URL again"):
        read_rows(without_secrets(text.partition(",")[0]))
