"""Rows of source files: JSON Lines, JSON, Parquet and CSV, each also ``.gz`` or ``.zst``, from disk or S3, or globs.

A row that cannot be read comes out as None with its number; the rest is kept. ``datasets`` would give up at the first.
"""

import csv
import fnmatch
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import IO, Any

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.packed import COMPRESSIONS, open_packed

TABLES = (".json", ".parquet", ".csv", ".tsv")
"""Formats that are no JSON Lines."""
FORMATS = (".jsonl", ".ndjson", *TABLES)
S3 = "s3://"
LONGEST_FIELD = 1 << 24
"""Characters of a CSV field; the csv module's own limit is 131,072."""

Numbered = tuple[int, dict[str, Any] | None]
"""A row and its 1-based line (JSON Lines, CSV) or place (JSON, Parquet); None is a row that is broken."""


def find_files(source: str, folder: Path) -> list[str]:
    """The files of a path, a glob or an ``s3://`` address, sorted. Relative paths start at ``folder``.

    Raises:
        CogumiError: there is none, one of an unknown format, or the bucket cannot be read.
    """
    if source.startswith(S3):
        found = sorted(s3_objects(source))
    elif any(mark in source for mark in "*?["):
        found = sorted(path for path in glob(str(folder / source), recursive=True) if Path(path).is_file())
    else:
        found = [str(folder / source)] if (folder / source).is_file() else []
    if not found:
        near = nearest(source, (path.name for path in folder.glob("*") if set(path.suffixes) & set(FORMATS)))
        raise CogumiError(f"there is no file {source}", near if not source.startswith(S3) else "check the address")
    for name in found:
        format_of(name)
    return found


def form_of(name: str) -> tuple[str, str]:
    """What a name tells of a file: its last suffix before its packing, and its packing ("" for none)."""
    path = Path(name.lower())
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    return Path(path.stem).suffix if packed else path.suffix, packed


def format_of(name: str) -> tuple[str, str]:
    """Format and compression ("" for none) of a file by its name. Raises CogumiError for another."""
    form, packed = form_of(name)
    if form not in FORMATS:
        mend = f"give one of {', '.join(FORMATS)}, as it is or as {' or '.join(COMPRESSIONS)}"
        raise CogumiError(f"{name} has no known format", mend)
    return form, packed


def read_rows(file: str) -> Iterator[Numbered]:
    """The rows of one file, streamed (a ``.json`` array is read whole).

    Raises:
        CogumiError: the file is damaged as a whole: cut off while compressed, no Parquet, no JSON.
    """
    form, packed = format_of(file)
    with _local(file) as path, _damage_explained(file), open_packed(path) as stream:
        if form in (".jsonl", ".ndjson"):
            yield from _lines(stream)
        elif form == ".json":
            yield from _json(stream, file)
        elif form == ".parquet":
            yield from _parquet(stream, packed)
        else:
            yield from _csv(stream, "\t" if form == ".tsv" else ",")


@contextmanager
def as_json_lines(inputs: Sequence[Path], beside: Path) -> Iterator[dict[Path, Path]]:
    """JSON Lines -> the input that they are of: the file itself, or a copy of a table in a folder that is removed.

    A row that cannot be read stays a broken line, in its place. An error about a copy names the input.
    """
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".lines-") as folder:
        lines: dict[Path, Path] = {}
        for number, path in enumerate(inputs):
            form, packed = form_of(path.name)
            copy = path
            if path.is_file() and form in TABLES:
                copy = Path(folder, str(number), path.stem if packed else path.name)
                copy.parent.mkdir()
                with copy.open("w", encoding="utf-8") as out:
                    for _, row in read_rows(str(path)):
                        out.write((json.dumps(row, default=str) if row is not None else "broken") + "\n")
            lines[copy] = path
        try:
            yield lines
        except CogumiError as error:
            raise CogumiError(as_given(error.problem, lines), error.mend) from error


def as_given(text: str, lines: Mapping[Path, Path]) -> str:
    """A message about the copies of ``as_json_lines`` as one about the inputs."""
    for copy, path in lines.items():
        text = text.replace(str(copy), str(path))
    return text


@contextmanager
def _damage_explained(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, csv.Error) as error:
        raise CogumiError(f"{file} cannot be read: {' '.join(str(error).split())}", "fetch the file again") from error


def _object(text: bytes | str) -> dict[str, Any] | None:
    try:
        row = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _lines(stream: Iterable[bytes]) -> Iterator[Numbered]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, _object(line)


def _json(stream: IO[bytes], file: str) -> Iterator[Numbered]:
    """An array of objects, an object that holds one such array, or JSON Lines under the wrong name."""
    content = stream.read()
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] != b"{":
            raise CogumiError(f"{file} is not JSON: {error}", "mend the place that the message names") from None
        yield from _lines(content.splitlines())
        return
    if isinstance(data, dict):
        arrays = [value for value in data.values() if isinstance(value, list)]
        data = arrays[0] if len(arrays) == 1 and all(isinstance(item, dict) for item in arrays[0]) else [data]
    for number, row in enumerate(data if isinstance(data, list) else [data], 1):
        yield number, row if isinstance(row, dict) else None


def _parquet(stream: IO[bytes], packed: str) -> Iterator[Numbered]:
    import pyarrow
    import pyarrow.parquet as parquet

    with tempfile.TemporaryFile() as plain:
        if packed:  # Parquet is read from its end, and a compressed stream has no way back
            shutil.copyfileobj(stream, plain)
        try:
            batches = parquet.ParquetFile(plain if packed else stream).iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        except pyarrow.ArrowInvalid as error:
            raise OSError(str(error)) from None


def _csv(stream: IO[bytes], delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
    rows = csv.DictReader(text, delimiter=delimiter)
    for row in rows:
        whole = None not in row and None not in row.values()  # neither too many fields nor too few
        yield rows.line_num, row if whole else None


# --- S3, through boto3, which reads keys, region and AWS_ENDPOINT_URL from the environment


def _s3_client() -> Any:
    try:
        import boto3
    except ImportError:
        raise CogumiError("reading from S3 needs boto3", "pip install boto3") from None
    return boto3.client("s3")


@contextmanager
def _s3_explained(address: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        mend = "check the address and the environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL)"
        raise CogumiError(f"{address}: {error}", mend, retryable=True) from error


def s3_objects(address: str) -> dict[str, str]:
    """Address -> entity tag of what an address or glob names."""
    bucket, _, key = address.removeprefix(S3).partition("/")
    start = re.split(r"[*?\[]", key, maxsplit=1)[0]
    with _s3_explained(address):
        client = _s3_client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
        items = [item for page in pages for item in page.get("Contents", ())]
    wanted = (item for item in items if item["Key"] == key or fnmatch.fnmatchcase(item["Key"], key))
    return {f"{S3}{bucket}/{item['Key']}": str(item["ETag"]) for item in wanted}


@contextmanager
def _local(file: str) -> Iterator[Path]:
    """The file on this machine; an object of S3 as a temporary copy."""
    if not file.startswith(S3):
        yield Path(file)
        return
    bucket, _, key = file.removeprefix(S3).partition("/")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(key).name
        with _s3_explained(file):
            _s3_client().download_file(bucket, key, str(path))
        yield path
