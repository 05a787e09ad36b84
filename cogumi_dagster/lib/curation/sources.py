"""The sources of a domain: task families and users' JSONL files, named in ``resources/sources/<domain>.yaml``.

    families:
      - chain_sum
      - name: gsm_symbolic
        weight: 2
    files:
      - my_questions.jsonl

Rows of a file are Alpaca-like: ``instruction`` (and ``input``), ``response`` (or ``output``), ``difficulty``,
``licence``. A file counts as one family of weight 1.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.jsonl import read_jsonl_tolerant
from cogumi_dagster.lib.profile import DOMAINS
from cogumi_dagster.lib.tasks import FILE_FAMILY, Pool, draw_from, family_pool, get_family
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Difficulty, Split, Task

log = logging.getLogger(__name__)

KEYS = ("families", "files")
ROW_KEYS = ("instruction", "input", "response", "output", "difficulty", "licence", "license", "source", "id")
UNKNOWN_LICENCE = "not stated"
_SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class DomainSources:
    """What a domain's tasks are drawn from."""

    domain: str
    path: Path
    families: Mapping[str, float]
    """Family name -> weight."""
    files: tuple[Path, ...]


@dataclass(frozen=True)
class SourcesReport:
    """What a draw brought. ``broken_lines``: file -> 1-based numbers of the lines that were left out."""

    domain: str
    wanted: int
    drawn: int
    families: Mapping[str, int]
    difficulties: Mapping[str, int]
    splits: Mapping[str, int]
    sources: Mapping[str, int]
    licences: Mapping[str, int]
    broken_lines: Mapping[str, tuple[int, ...]]

    @property
    def broken(self) -> int:
        return sum(map(len, self.broken_lines.values()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_sources(domain: str, folder: Path) -> DomainSources:
    """Read ``<folder>/<domain>.yaml``.

    Raises:
        CogumiError: no such file, not YAML, an unknown key or family, a weight that is no positive number, a
            file that does not exist or lies outside the folder, no source at all; with file, key and nearest.
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
        raise CogumiError(f"{path} holds no mapping", "give it the keys families and files")
    for key in data:
        if key not in KEYS:
            raise CogumiError(f"{path}: unknown key {key!r}", nearest(str(key), KEYS))
    families = dict(_family(path, entry) for entry in _list_of(path, data, "families"))
    files = tuple(_file(path, folder, entry) for entry in _list_of(path, data, "files"))
    if not families and not files:
        raise CogumiError(f"{path} names no source", "add a family under families, or a JSONL file under files")
    return DomainSources(domain, path, families, files)


def draw_source_examples(domain: str, folder: Path, count: int, seed: int) -> tuple[list[Task], SourcesReport]:
    """``count`` distinct tasks of the splits train and validation, 30/50/20 easy/medium/hard, and what they are.

    Fewer come back where all sources are exhausted. A broken line of a file is counted and the rest kept.

    Raises:
        CogumiError: see ``load_sources``; also a row with an unknown key (file, line, key, nearest).
    """
    sources = load_sources(domain, folder)
    pools: dict[str, tuple[float, Pool]] = {
        name: (weight, family_pool(name, seed)) for name, weight in sources.families.items()
    }
    broken: dict[str, tuple[int, ...]] = {}
    for path in sources.files:
        rows, lines = read_source_file(path, domain)
        if lines:
            broken[path.name] = lines
            log.warning("%s: %d broken line(s) left out: %s", path, len(lines), ", ".join(map(str, lines[:10])))
        pools[f"{FILE_FAMILY}:{path.name}"] = (1.0, partial(_from_rows, rows))
    tasks = draw_from(pools, count, _SPLITS)
    if len(tasks) < count:
        log.warning("%s: the sources hold only %d of the %d tasks asked for", domain, len(tasks), count)
    return tasks, _report(domain, count, tasks, broken)


def read_source_file(path: Path, domain: str) -> tuple[list[Task], tuple[int, ...]]:
    """A user's JSONL file as tasks without a verifier, and the numbers of its broken lines.

    Broken is a line that is not a JSON object, has no instruction, or has an unknown difficulty.
    """
    if not path.is_file():
        raise CogumiError(f"there is no file {path}", "check the path in the sources' YAML file")
    tasks: dict[str, Task] = {}
    _, report = read_jsonl_tolerant(path)
    broken = set(report.broken_lines)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number in broken or not line.strip():
                continue
            task = _task_of(path, number, json.loads(line.decode("utf-8")), domain)
            if task is None:
                broken.add(number)
            else:
                tasks.setdefault(task.id, task)
    return list(tasks.values()), tuple(sorted(broken))


def sources_version(domain: str, folder: Path) -> str:
    """SHA-256 (hex) over the YAML file, each file that it names and the versions of its families."""
    sources = load_sources(domain, folder)
    digest = hashlib.sha256()
    parts: list[tuple[str, bytes]] = [(sources.path.name, sources.path.read_bytes())]
    parts += [(path.name, path.read_bytes()) for path in sources.files]
    parts += [(name, _version_of(name).encode()) for name in sources.families]
    for name, content in parts:
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _version_of(family: str) -> str:
    """The family's code version, and that of the data file that it reads."""
    one = get_family(family)
    version = str(getattr(one, "version", "1"))
    if family.endswith("_guided"):
        from cogumi_dagster.lib.tasks.writing import seeds_version

        return f"{version}:{seeds_version(one.domain)}"
    return version


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
    try:
        get_family(str(name))
    except CogumiError as error:
        raise CogumiError(f"{path}: families: {error.problem}", error.mend) from None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise CogumiError(f"{path}: families: the weight of {name} is {weight!r}", "give a number greater than 0")
    return str(name), float(weight)


def _file(path: Path, folder: Path, entry: Any) -> Path:
    if not isinstance(entry, str):
        raise CogumiError(f"{path}: files: {entry!r} is no path", "give a path relative to the folder")
    file = folder / entry
    if not file.resolve().is_relative_to(folder.resolve()):
        raise CogumiError(f"{path}: files: {entry} lies outside {folder}", "put the file into the folder")
    if not file.is_file():
        near = nearest(entry, (other.name for other in folder.glob("*.jsonl")))
        raise CogumiError(f"{path}: files: there is no {entry} in {folder}", near)
    return file


def _task_of(path: Path, number: int, row: Mapping[str, Any], domain: str) -> Task | None:
    for key in row:
        if key not in ROW_KEYS:
            raise CogumiError(f"{path}: line {number}: unknown key {key!r}", nearest(key, ROW_KEYS))
    instruction, extra = row.get("instruction"), row.get("input") or ""
    response = row.get("response") or row.get("output")
    difficulty = row.get("difficulty") or "medium"
    texts = (instruction, extra, response or "", difficulty)
    if not all(isinstance(text, str) for text in texts) or not str(instruction).strip():
        return None
    if difficulty not in DIFFICULTIES:
        return None
    return Task(
        domain=domain,
        family=FILE_FAMILY,
        difficulty=difficulty,
        prompt=f"{instruction}\n{extra}".strip(),
        solution=response,
        source=path.name,
        licence=str(row.get("licence") or row.get("license") or UNKNOWN_LICENCE),
    )


def _from_rows(rows: list[Task], number: int, difficulty: Difficulty) -> list[Task]:
    return [task for task in rows if task.difficulty == difficulty][:number]


def _report(domain: str, wanted: int, tasks: list[Task], broken: Mapping[str, tuple[int, ...]]) -> SourcesReport:
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
    )
