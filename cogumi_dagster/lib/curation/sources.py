"""The sources of a domain: task families, files and datasets, named in ``resources/sources/<domain>.yaml``.

    families:
      - chain_sum
      - name: gsm_symbolic
        weight: 2
    files:
      - my_questions.jsonl
      - {path: "s3://bucket/dolly/*.parquet", mapping: dolly, licence: CC-BY-SA-3.0, limit: 1000, weight: 2}
    datasets:
      - {name: tatsu-lab/alpaca, revision: main, split: train, limit: 1000}

A file is JSON Lines, JSON, Parquet or CSV, also ``.gz`` or ``.zst``; a relative path starts at the YAML's folder. A
dataset is one of the Hugging Face hub. Each entry counts as one family of its weight. Mappings: ``mappings.py``.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cogumi_dagster.lib.curation.files import S3, find_files, s3_objects
from cogumi_dagster.lib.curation.hub import HubDataset, read_dataset
from cogumi_dagster.lib.curation.licences import declared
from cogumi_dagster.lib.curation.mappings import mapping_named
from cogumi_dagster.lib.curation.records import SourceRecord, Tally, read_records
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.profile import DOMAINS
from cogumi_dagster.lib.tasks import FILE_FAMILY, Pool, draw_from, family_pool, family_version, get_family
from cogumi_dagster.lib.tasks.base import Difficulty, Split, Task

log = logging.getLogger(__name__)

T = TypeVar("T")

KEYS = ("families", "files", "datasets")
_SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class FileSource:
    """A file, glob or ``s3://`` address of a domain."""

    path: str
    mapping: str | None = None
    licence: str | None = None
    limit: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class DomainSources:
    """What a domain's tasks are drawn from."""

    domain: str
    path: Path
    families: Mapping[str, float]
    """Family name -> weight."""
    files: tuple[FileSource, ...] = ()
    datasets: tuple[HubDataset, ...] = ()


@dataclass(frozen=True)
class SourcesReport:
    """What a draw brought. ``broken_lines``: file or dataset -> 1-based numbers of the rows that were left out."""

    domain: str
    wanted: int
    drawn: int
    families: Mapping[str, int]
    difficulties: Mapping[str, int]
    splits: Mapping[str, int]
    sources: Mapping[str, int]
    licences: Mapping[str, int]
    broken_lines: Mapping[str, tuple[int, ...]]
    other_domains: Mapping[str, int] = field(default_factory=dict)
    """Rows left out because they state another domain, by that domain."""


def load_sources(domain: str, folder: Path) -> DomainSources:
    """Read ``<folder>/<domain>.yaml``.

    Raises:
        CogumiError: no such file, not YAML, an unknown key, family or mapping, a weight or limit that is no
            positive number, a local file that does not exist, no source at all; with file, key and nearest.
    """
    path = folder / f"{domain}.yaml"
    if not path.is_file():
        known = sorted({*DOMAINS, *(other.stem for other in folder.glob("*.yaml"))})
        raise CogumiError(f"there are no sources for {domain!r}: {path} is missing", nearest(domain, known))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise CogumiError(f"{path} is not YAML: {error}", "mend the line that the message names") from None
    if not isinstance(data, dict):
        raise CogumiError(f"{path} holds no mapping", f"give it the keys {', '.join(KEYS)}")
    for key in data:
        if key not in KEYS:
            raise CogumiError(f"{path}: unknown key {key!r}", nearest(str(key), KEYS))
    sources = DomainSources(
        domain,
        path,
        dict(_family(path, entry) for entry in _list_of(path, data, "families")),
        tuple(_entry(path, "files", FileSource, "path", entry) for entry in _list_of(path, data, "files")),
        tuple(_entry(path, "datasets", HubDataset, "name", entry) for entry in _list_of(path, data, "datasets")),
    )
    for file in sources.files:
        if not file.path.startswith(S3):  # a bucket is asked when it is read
            _named_in(path, "files", partial(find_files, file.path, folder))
    if not (sources.families or sources.files or sources.datasets):
        raise CogumiError(f"{path} names no source", "add a family, a file or a dataset")
    return sources


def draw_source_examples(domain: str, folder: Path, count: int, seed: int) -> tuple[list[Task], SourcesReport]:
    """``count`` distinct tasks of the splits train and validation, 30/50/20 easy/medium/hard, and what they are.

    Fewer come back where all sources are exhausted. Broken rows are counted and the rest kept; so are rows that state
    another domain. A row that states no difficulty counts as medium.

    Raises:
        CogumiError: see ``load_sources``, ``read_records`` and ``read_dataset``.
    """
    sources = load_sources(domain, folder)
    pools: dict[str, tuple[float, Pool]] = {
        name: (weight, family_pool(name, seed)) for name, weight in sources.families.items()
    }
    tally, others = Tally(), Counter[str]()
    for source, weight, records in _records(sources, folder, tally):
        rows: dict[str, Task] = {}
        for record in records:
            if record.domain == domain:
                task = task_of(record, domain)
                rows.setdefault(task.id, task)
            else:
                others[str(record.domain)] += 1
        _warn_of_licences(source, rows.values())
        pools[f"{FILE_FAMILY}:{len(pools)}:{source}"] = (weight, partial(_from_rows, list(rows.values())))
    broken = {name: tuple(numbers) for name, numbers in tally.broken.items()}
    for name, numbers in broken.items():
        log.warning("%s: %d broken row(s) left out: %s", name, len(numbers), ", ".join(map(str, numbers[:10])))
    tasks = draw_from(pools, count, _SPLITS)
    if len(tasks) < count:
        log.warning("%s: the sources hold only %d of the %d tasks asked for", domain, len(tasks), count)
    return tasks, _report(domain, count, tasks, broken, others)


def task_of(record: SourceRecord, domain: str) -> Task:
    """A record as a task without a verifier; its payload says which row it was."""
    row: dict[str, Any] = {"row": record.row}
    if record.revision:
        row["revision"] = record.revision
    return Task(
        domain=domain,
        family=FILE_FAMILY,
        difficulty=record.difficulty or "medium",
        prompt=record.instruction,
        payload=row,
        solution=record.response,
        source=record.source,
        licence=record.licence,
    )


def _records(sources: DomainSources, folder: Path, tally: Tally) -> Iterator[tuple[str, float, Iterator[SourceRecord]]]:
    """Name, weight and records of each file and dataset."""
    for file in sources.files:
        read = read_records(file.path, file.mapping, sources.domain, licence=file.licence, folder=folder, tally=tally)
        yield file.path, file.weight, islice(read, file.limit)
    for dataset in sources.datasets:
        yield dataset.name, dataset.weight, read_dataset(dataset, sources.domain, tally)


def _warn_of_licences(source: str, tasks: Iterable[Task]) -> None:
    refused = Counter(task.licence for task in tasks if declared(task.licence))
    for licence, number in refused.items():
        log.warning(
            "%s: %d row(s) are under %s. Curation drops them unless dataset.filters.licences names it", source, number,
            licence,
        )  # fmt: skip


def names_datasets(folder: Path) -> bool:
    """Whether any domain draws on a dataset of the hub, which must then be reached. Says nothing of broken files."""
    for path in folder.glob("*.yaml"):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if isinstance(data, dict) and data.get("datasets"):
            return True
    return False


def sources_version(domain: str, folder: Path) -> str:
    """SHA-256 (hex) over the YAML file, each file that it names and the versions of its families.

    Of S3 objects it is their entity tags; of a dataset its entry, so that a pinned revision is a version.
    """
    sources = load_sources(domain, folder)
    digest = hashlib.sha256()
    parts: list[tuple[str, bytes]] = [(sources.path.name, sources.path.read_bytes())]
    for file in sources.files:
        if file.path.startswith(S3):
            parts += [(name, tag.encode()) for name, tag in sorted(s3_objects(file.path).items())]
        else:
            parts += [(Path(name).name, _hash(name)) for name in find_files(file.path, folder)]
    parts += [(name, family_version(name).encode()) for name in sources.families]
    for name, content in parts:
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


LARGE = 1 << 24
"""Bytes from which a file is hashed again only when its size or time changes: a sensor asks every minute."""


def _hash(name: str) -> bytes:
    found = Path(name).stat()
    if found.st_size < LARGE:
        return hashlib.sha256(Path(name).read_bytes()).digest()
    return _hash_of_large(name, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_of_large(name: str, size: int, changed: int) -> bytes:
    with Path(name).open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _list_of(path: Path, data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key) or []
    if not isinstance(value, list):
        raise CogumiError(f"{path}: {key} is not a list", f'write each entry of {key} on a line that starts with "- "')
    return value


def _family(path: Path, entry: Any) -> tuple[str, float]:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, dict) or "name" not in entry:
        raise CogumiError(f"{path}: families: {entry!r} is no family", "give a name, or name and weight")
    for key in entry:
        if key not in ("name", "weight"):
            raise CogumiError(f"{path}: families: unknown key {key!r}", nearest(str(key), ("name", "weight")))
    name, weight = entry["name"], entry.get("weight", 1)
    _named_in(path, "families", partial(get_family, str(name)))
    _positive(f"{path}: families: the weight of {name}", weight)
    return str(name), float(weight)


def _entry(path: Path, key: str, kind: Callable[..., T], first: str, entry: Any) -> T:
    """An entry of files or datasets: its first field alone, or a mapping of the fields of ``kind``."""
    given = {first: entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not isinstance(given.get(first), str):
        raise CogumiError(f"{path}: {key}: {entry!r} has no {first}", f"give a {first}, alone or with other fields")
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for name, value in given.items():
        where = f"{path}: {key}: {given[first]}"
        if name not in known:
            raise CogumiError(f"{where}: unknown key {name!r}", nearest(str(name), known))
        if name in ("limit", "weight"):
            _positive(f"{where}: {name}", value, whole=name == "limit")
        elif not isinstance(value, str):
            raise CogumiError(f"{where}: {name} is {value!r}", "give a text, in quotation marks where it is a number")
    if "mapping" in given:
        _named_in(path, key, partial(mapping_named, given["mapping"]))
    return kind(**given)


def _positive(where: str, value: Any, *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < float("inf"):
        raise CogumiError(f"{where} is {value!r}", f"give a {'whole ' if whole else ''}number greater than 0")


def _named_in(path: Path, key: str, look_up: Callable[[], T]) -> T:
    """What a look-up finds; its error says in which file and key the name stands."""
    try:
        return look_up()
    except CogumiError as error:
        raise CogumiError(f"{path}: {key}: {error.problem}", error.mend) from None


def _from_rows(rows: list[Task], number: int, difficulty: Difficulty) -> list[Task]:
    return [task for task in rows if task.difficulty == difficulty][:number]


def _report(
    domain: str, wanted: int, tasks: Sequence[Task], broken: Mapping[str, tuple[int, ...]], others: Mapping[str, int]
) -> SourcesReport:
    return SourcesReport(
        domain=domain,
        wanted=wanted,
        drawn=len(tasks),
        families=dict(Counter(task.family for task in tasks)),
        difficulties=dict(Counter(task.difficulty for task in tasks)),
        splits=dict(Counter(task.split for task in tasks)),
        sources=dict(Counter(task.source for task in tasks)),
        licences=dict(Counter(task.licence for task in tasks)),
        broken_lines=broken,
        other_domains=dict(others),
    )
