"""Near-duplicate removal on a Ray cluster: the same kernels and keep rule, the files' ranges spread by Ray Data.

1. Each worker signs a range of a file and sends back, for each line, its place and its band keys: no text.
2. The driver joins lines that share a band into components. A keep rule's decision depends on a text's own component
   only, so components are settled apart from each other, each by ``represent`` on one worker, with the same result as
   on one machine. The driver holds about 200 bytes for each line.
3. Each worker writes the lines of a range that stay.

Files must be where every worker can read them: a shared folder, or a URI that fsspec opens (``s3://...``).
"""

import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.dedup.corpus import read_corpus
from cogumi_dagster.lib.dedup.files import row_labels, row_of_line, text_of_row
from cogumi_dagster.lib.dedup.minhash import checked, lsh_keys, signatures
from cogumi_dagster.lib.dedup.representatives import Representatives, represent
from cogumi_dagster.lib.dedup.texts import EXCERPT, DedupReport, dedup_report, example_pairs, visiting_order
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DedupConfig

Array = NDArray[Any]
RANGE_BYTES = 64 << 20
TEXTS_AT_ONCE = 20_000
GROUP_BYTES = 64 << 20
"""Components are settled together until their lines are about this large."""


@dataclass(frozen=True)
class _Lines:
    """Every line with a text: its file, place and length in it, what decides its rank, and its band keys."""

    file: Array
    offset: Array
    length: Array
    score: Array
    name: Array
    digest: Array
    keys: Array
    domain: list[str]
    source: list[str]


def dedup_on_ray(
    inputs: Sequence[Path | str], output: Path, config: DedupConfig, range_bytes: int = RANGE_BYTES
) -> DedupReport:
    """Deduplicate plain JSON Lines files into a folder of parts. Joins a running cluster, or starts Ray here.

    Raises:
        CogumiError: Ray is not installed; no such file; a packed file (it cannot be split); no row with a text.
    """
    checked(config)
    started = time.perf_counter()
    files = [str(path) for path in inputs]
    ranges = _ranges(files, range_bytes)
    lines = _sign(files, ranges, config)
    order = visiting_order(len(lines.file), config, lines.score, lines.name, lines.digest)

    def places(part: Array) -> dict[str, Any]:
        return {"file": lines.file[part], "offset": lines.offset[part], "length": lines.length[part]}

    found = _settle(lines.keys, lines.length, order, config, places, files)
    _write(files, ranges, lines, found, output)

    pairs = example_pairs(found, config)
    excerpts = {number: _excerpt(files, lines, number) for pair in pairs for number in pair[:2]}
    seconds = time.perf_counter() - started
    return dedup_report(found, config, seconds, pairs, excerpts, domains=lines.domain, sources=lines.source)


def represent_ray(texts: Sequence[str], order: Array, config: DedupConfig) -> Representatives:
    """The keep rule for texts in memory, which travel through Ray's object store: no shared folder is needed."""
    if not texts:
        return Representatives(np.arange(0), np.ones(0), np.zeros(0, bool), 0)
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    bounds = [*range(0, len(encoded), TEXTS_AT_ONCE), len(encoded)]
    items = [{"texts": encoded[begin:end]} for begin, end in pairwise(bounds)]
    signed = _ray_data().from_items(items, override_num_blocks=len(items)).map_batches(
        _sign_texts, batch_size=1, fn_kwargs={"config": config}
    )  # fmt: skip
    keys = np.concatenate([batch["keys"] for batch in signed.iter_batches(batch_size=None, batch_format="numpy")])
    return _settle(keys, lengths, order, config, lambda part: {"texts": [encoded[n] for n in part.tolist()]}, ())


def _sign_texts(batch: dict[str, Array], config: DedupConfig) -> dict[str, Any]:
    return {"keys": np.ascontiguousarray(lsh_keys(signatures(_decoded(batch), config), config).T)}


def _decoded(batch: dict[str, Array]) -> list[str]:
    return [bytes(text).decode("utf-8", "surrogatepass") for text in batch["texts"][0]]


def _ray_data() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise CogumiError(
            "the engine ray needs Ray Data", "pip install 'ray[data]', or use the engine native"
        ) from None
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    return ray.data


def _open(path: str) -> Any:
    if "://" in path:
        import fsspec

        return fsspec.open(path, "rb").open()
    return open(path, "rb")


def _ranges(files: Sequence[str], size: int) -> list[dict[str, Any]]:
    ranges: list[dict[str, Any]] = []
    for number, path in enumerate(files):
        if path.endswith((".gz", ".zst")):
            raise CogumiError(f"{path} is packed and cannot be split", "unpack it first, or use the engine native")
        try:
            with _open(path) as file:
                length = file.seek(0, io.SEEK_END)
        except FileNotFoundError:
            raise CogumiError(f"there is no file {path}", "check the path") from None
        ranges += [{"file": number, "begin": b, "end": min(b + size, length)} for b in range(0, length, size)]
    return ranges


def _lines_of(path: str, begin: int, end: int) -> "list[tuple[int, bytes]]":
    """The lines that begin in a range, with where they begin."""
    lines: list[tuple[int, bytes]] = []
    with _open(path) as file:
        at = begin
        if begin:
            file.seek(begin - 1)
            at = begin - 1 + len(file.readline())  # the line before, or what of it lies in this range
        while at < end and (line := file.readline()):
            lines.append((at, line))
            at += len(line)
    return lines


def _sign(files: Sequence[str], ranges: list[dict[str, Any]], config: DedupConfig) -> _Lines:
    if not ranges:
        raise CogumiError("the files hold nothing", "give files with rows")
    signed = _ray_data().from_items(ranges, override_num_blocks=len(ranges)).map_batches(
        _sign_range, batch_size=1, fn_kwargs={"files": list(files), "config": config}
    )  # fmt: skip
    batches = [batch for batch in signed.iter_batches(batch_size=None, batch_format="numpy") if len(batch["file"])]
    if not batches:
        raise CogumiError("no row has a text", "rename its fields to instruction/response, question/answer or text")
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    domain, source = columns.pop("domain").tolist(), columns.pop("source").tolist()
    return _Lines(**columns, domain=domain, source=source)


def _sign_range(batch: dict[str, Array], files: list[str], config: DedupConfig) -> dict[str, Any]:
    file, begin, end = (int(batch[name][0]) for name in ("file", "begin", "end"))
    texts: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("offset", "length", "score", "name", "domain", "source")}
    for at, line in _lines_of(files[file], begin, end):
        row = row_of_line(line)
        text = text_of_row(row) if row is not None else None
        if row is None or text is None:
            continue
        texts.append(text)
        values = (at, len(line), *row_labels(row, os.path.basename(files[file])))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    with ThreadPoolExecutor(1) as pool:
        corpus = read_corpus(texts, config, pool)
    kinds: dict[str, Any] = {"offset": np.int64, "length": np.int64, "score": np.float64, "name": np.uint64}
    numbers = {name: np.array(columns[name], kind) for name, kind in kinds.items()}
    labels = {name: np.array(columns[name], dtype=object) for name in ("domain", "source")}
    return {
        "file": np.full(len(texts), file, np.int32), **numbers, **labels,
        "digest": corpus.digests, "keys": np.ascontiguousarray(lsh_keys(corpus.signatures, config).T),
    }  # fmt: skip


def _settle(
    keys: Array,
    lengths: Array,
    order: Array,
    config: DedupConfig,
    contents: Callable[[Array], dict[str, Any]],
    files: Sequence[str],
) -> Representatives:
    """Apply the keep rule to every component of texts that share a band, each on some worker. ``contents``: the texts
    of such a group, or where in ``files`` they are."""
    count = len(keys)
    found = Representatives(np.arange(count), np.ones(count), np.zeros(count, bool), 0)
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    component = _components(keys)
    shared = np.flatnonzero(np.bincount(component)[component] > 1)
    if not len(shared):
        return found
    shared = shared[np.lexsort((rank[shared], component[shared]))]
    begins = np.flatnonzero(np.concatenate(([True], np.diff(component[shared]) != 0)))
    group = np.cumsum(lengths[shared])[begins] // GROUP_BYTES
    parts = np.split(shared, begins[np.flatnonzero(np.diff(group)) + 1])
    items = [{"number": part, **contents(part)} for part in parts]
    settled = _ray_data().from_items(items, override_num_blocks=len(items)).map_batches(
        _settle_group, batch_size=1, fn_kwargs={"files": list(files), "config": config}
    )  # fmt: skip
    verified = 0
    for batch in settled.iter_batches(batch_size=None, batch_format="numpy"):
        found.kept_by[batch["number"]] = batch["kept_by"]
        found.similarity[batch["number"]] = batch["similarity"]
        found.exact[batch["number"]] = batch["exact"]
        verified += int(batch["verified"].sum())
    return Representatives(found.kept_by, found.similarity, found.exact, verified)


def _components(keys: Array) -> Array:
    """Number of the component of each line: lines that share a band, directly or through others."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    count, bands = keys.shape
    ends, starts = [], []
    for band in range(bands):
        by_key = np.argsort(keys[:, band])
        same = np.diff(keys[by_key, band]) == 0
        starts.append(by_key[:-1][same])
        ends.append(by_key[1:][same])
    one, other = np.concatenate(starts), np.concatenate(ends)
    graph = csr_matrix((np.ones(len(one), np.int8), (one, other)), shape=(count, count))
    component: Array = connected_components(graph, directed=False)[1]
    return component


def _settle_group(batch: dict[str, Array], files: list[str], config: DedupConfig) -> dict[str, Any]:
    number = np.asarray(batch["number"][0])
    if "texts" in batch:
        texts = _decoded(batch)
    else:
        places = zip(*(np.asarray(batch[name][0]).tolist() for name in ("file", "offset", "length")), strict=True)
        texts = [_text_at(files[file], offset, length) for file, offset, length in places]
    with ThreadPoolExecutor(1) as pool:
        corpus = read_corpus(texts, config, pool)
        found = represent(corpus, np.arange(len(texts)), config, pool)
    verified = np.zeros(len(number), np.int64)
    verified[0] = found.verified
    return {
        "number": number, "kept_by": number[found.kept_by], "similarity": found.similarity, "exact": found.exact,
        "verified": verified,
    }  # fmt: skip


def _text_at(path: str, offset: int, length: int) -> str:
    with _open(path) as file:
        file.seek(offset)
        row = row_of_line(file.read(length))
    return text_of_row(row or {}) or ""


def _write(
    files: Sequence[str], ranges: list[dict[str, Any]], lines: _Lines, found: Representatives, output: Path
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    kept = found.kept_by == np.arange(len(lines.file))
    items = []
    for number, one in enumerate(ranges):
        mine = kept & (lines.file == one["file"]) & (lines.offset >= one["begin"]) & (lines.offset < one["end"])
        items.append({**one, "part": number, "keep": lines.offset[mine]})
    _ray_data().from_items(items, override_num_blocks=len(items)).map_batches(
        _write_range, batch_size=1, fn_kwargs={"files": list(files), "output": str(output)}
    ).materialize()  # fmt: skip


def _write_range(batch: dict[str, Array], files: list[str], output: str) -> dict[str, Any]:
    file, begin, end, part = (int(batch[name][0]) for name in ("file", "begin", "end", "part"))
    keep = set(np.asarray(batch["keep"][0]).tolist())
    path = Path(output) / f"part-{part:05d}.jsonl"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as out:
        for at, line in _lines_of(files[file], begin, end):
            if at in keep:
                out.write(line if line.endswith(b"\n") else line + b"\n")
    os.replace(temporary, path)
    return {"part": np.array([part])}


def _excerpt(files: Sequence[str], lines: _Lines, number: int) -> tuple[str, str]:
    file, offset = int(lines.file[number]), int(lines.offset[number])
    text = _text_at(files[file], offset, int(lines.length[number]))
    return f"{os.path.basename(files[file])}@{offset}", text[:EXCERPT]
