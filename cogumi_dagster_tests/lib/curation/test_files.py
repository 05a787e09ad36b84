"""Rows of every format and compression, from disk, globs and S3; broken rows keep their numbers."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from moto.server import ThreadedMotoServer

from cogumi_dagster.lib.curation.files import find_files, read_rows, s3_objects
from cogumi_dagster.lib.errors import CogumiError

ROWS = [{"instruction": "Add 1 and 2, please.", "output": "3"}, {"instruction": 'Say "hi"\ntwice', "output": "hi, hi"}]


def content(form: str) -> bytes:
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if form == "json":
        return json.dumps(ROWS, indent=2).encode()
    if form == "csv":
        return '\ufeffinstruction,output\n"Add 1 and 2, please.",3\n"Say ""hi""\ntwice","hi, hi"\n'.encode()
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_every_format_and_compression_gives_the_same_rows(tmp_path: Path, form: str, packed: str) -> None:
    path = tmp_path / f"rows.{form}{packed}"
    path.write_bytes(PACK[packed](content(form)))
    assert [row for _, row in read_rows(str(path))] == ROWS


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "numbers", "broken"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a"\n[]\n{"a": "\\ud800"}\n' + "[" * 9999, [1, 3, 4, 5, 6], [3, 4, 6]),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', [1, 2], [2]),
        ("a.json", '[{"a": 1}, 3, {"a": 2}]', [1, 2, 3], [2]),
        ("a.json", '{"version": 1, "data": [{"a": 1}, {"a": 2}]}', [1, 2], []),
        ("a.json", '{"a": 1}', [1], []),
        ("a.json", '{"a": 1}\n{"a"\n{"a": 2}', [1, 2, 3], [2]),
        ("a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n", [2, 3, 4, 5], [3, 4]),
        ("a.tsv", "a\tb\n1\t2\n", [2], []),
    ],
)
def test_broken_rows_keep_their_numbers_and_the_rest_is_read(
    tmp_path: Path, name: str, text: str | bytes, numbers: list[int], broken: list[int]
) -> None:
    rows = list(read_rows(write(tmp_path / name, text)))
    assert [number for number, _ in rows] == numbers
    assert [number for number, row in rows if row is None] == broken


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"a,b\n{'x' * 200_000},y\n")
    assert [len(row["a"]) for _, row in read_rows(path) if row] == [200_000]


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("a.jsonl.gz", gzip.compress(content("jsonl"))[:-9]),
        ("a.jsonl.zst", zstandard.compress(content("jsonl"))[:-5]),
        ("a.jsonl.gz", content("jsonl")),
        ("a.parquet", b"PAR1 and no more"),
        ("a.parquet.zst", zstandard.compress(b"no table")),
        ("a.json", b"[{]"),
    ],
)
def test_a_damaged_file_is_refused_not_cut_short(tmp_path: Path, name: str, damaged: bytes) -> None:
    with pytest.raises(CogumiError, match=r"a\.\w+.* (cannot be read|is not JSON)"):
        list(read_rows(write(tmp_path / name, damaged)))


def test_globs_are_sorted_and_absolute_paths_are_taken(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "d.txt"):
        write(tmp_path / name, "{}")
    found = find_files("*.jsonl", tmp_path)
    assert [Path(name).name for name in found] == ["a.jsonl", "b.jsonl"]
    assert len(find_files("**/*.jsonl", tmp_path)) == 3
    assert find_files(str(tmp_path / "a.jsonl"), Path("/elsewhere")) == [str(tmp_path / "a.jsonl")]


def test_what_is_not_there_or_has_no_format_is_told(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl.gz", gzip.compress(b""))
    for wanted in ("mien.jsonl.gz", "*.parquet"):
        with pytest.raises(CogumiError, match="there is no file") as caught:
            find_files(wanted, tmp_path)
        assert "mine.jsonl.gz" in caught.value.mend
    with pytest.raises(CogumiError, match="no known format") as caught:
        list(read_rows(write(tmp_path / "rows.txt.gz", b"")))
    assert ".jsonl" in caught.value.mend and ".zst" in caught.value.mend


# --- S3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "MAX_ATTEMPTS": "1", "DEFAULT_REGION": "us-east-1",
        "ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    yield client
    server.stop()


def test_objects_are_found_by_address_and_glob_and_read(bucket: Any, tmp_path: Path) -> None:
    for key in ("dolly/a.jsonl.gz", "dolly/b.parquet", "dolly/readme.md"):
        form = key.split(".")[1]
        body = gzip.compress(content(form)) if key.endswith(".gz") else content(form)
        bucket.put_object(Bucket="data", Key=key, Body=body)
    assert find_files("s3://data/dolly/*.*[zt]", tmp_path) == [
        "s3://data/dolly/a.jsonl.gz",
        "s3://data/dolly/b.parquet",
    ]
    for name in ("a.jsonl.gz", "b.parquet"):
        assert [row for _, row in read_rows(f"s3://data/dolly/{name}")] == ROWS
    tags = s3_objects("s3://data/dolly/a.jsonl.gz")
    bucket.put_object(Bucket="data", Key="dolly/a.jsonl.gz", Body=gzip.compress(b"{}"))
    assert list(tags) == ["s3://data/dolly/a.jsonl.gz"] and s3_objects("s3://data/dolly/a.jsonl.gz") != tags


def test_s3_mistakes_are_explained(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CogumiError, match=r"there is no file s3://data/none\.jsonl"):
        find_files("s3://data/none.jsonl", tmp_path)
    with pytest.raises(CogumiError, match=r"s3://nowhere/a.jsonl: .*does not exist"):
        find_files("s3://nowhere/a.jsonl", tmp_path)
    with pytest.raises(CogumiError, match=r"s3://data/none.jsonl: .*Not Found"):
        list(read_rows("s3://data/none.jsonl"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CogumiError, match="Could not connect") as caught:
        find_files("s3://data/a.jsonl", tmp_path)
    assert caught.value.retryable and "AWS_ENDPOINT_URL" in caught.value.mend
