"""Records of a source: instruction and response with their provenance, whatever the source's format and fields."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cogumi_dagster.lib.curation.files import Numbered, find_files, read_rows
from cogumi_dagster.lib.curation.mappings import MAPPINGS, RowMapping, mapping_for, mapping_named
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.tasks.base import Difficulty

UNKNOWN_LICENCE = "not stated"
UNMAPPED_ROWS = 20
"""After so many rows that fit no mapping, a file is refused; before that they count as broken."""


@dataclass(frozen=True)
class SourceRecord:
    """One row of a source. ``domain`` and ``difficulty`` are the row's own word or its dataset's; None is unknown."""

    instruction: str
    response: str | None
    domain: str | None
    difficulty: Difficulty | None
    source: str
    """The file (below its folder, or by name), the S3 address, or the dataset's name."""
    licence: str
    row: int
    """1-based line (JSON Lines, CSV) or place (other formats, datasets)."""
    revision: str | None = None
    """Commit of a dataset of the hub."""


@dataclass
class Tally:
    """What a reading kept and left out, by source; filled while the records are read."""

    records: int = 0
    broken: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Numbers of the rows that could not be read or hold no instruction."""


def read_records(
    source: str | Path,
    mapping: str | None = None,
    domain: str | None = None,
    *,
    licence: str | None = None,
    folder: Path = Path(),
    tally: Tally | None = None,
) -> Iterator[SourceRecord]:
    """The records of a file, a glob or an ``s3://`` address, streamed.

    Args:
        mapping: a name of ``MAPPINGS``; left out, each file's is found by the fields of its rows.
        domain: of rows that state none; left out, the mapping's.
        licence: of rows that state none.
        folder: where relative paths start.
        tally: is told of the broken rows, which are left out.

    Raises:
        CogumiError: no such file, mapping or format; a damaged file; rows that fit no mapping.
    """
    named = mapping_named(mapping) if mapping else None
    for file in find_files(str(source), folder):
        label = _label(file, folder)
        yield from records_of(read_rows(file), label, named, domain, licence=licence, tally=tally)


def records_of(
    rows: Iterable[Numbered],
    source: str,
    mapping: RowMapping | None,
    domain: str | None,
    *,
    licence: str | None = None,
    revision: str | None = None,
    tally: Tally | None = None,
) -> Iterator[SourceRecord]:
    """The records of numbered rows. Raises CogumiError for rows that fit no mapping."""
    tally = tally if tally is not None else Tally()
    unmapped = 0
    last: object = None
    for number, row in rows:
        if mapping is None and row is not None and (mapping := mapping_for(row)) is None:
            unmapped, last = unmapped + 1, row
            if unmapped == UNMAPPED_ROWS:
                break
        try:
            parts = mapping.read(row) if mapping is not None and row is not None else None
        except ValueError:
            parts = None
        if parts is None:
            tally.broken[source].append(number)
            continue
        tally.records += 1
        yield SourceRecord(
            instruction=parts.instruction,
            response=parts.response,
            domain=parts.domain or domain or (mapping.domain if mapping else None),
            difficulty=parts.difficulty,
            source=source,
            licence=parts.licence or licence or UNKNOWN_LICENCE,
            row=number,
            revision=revision,
        )
    if mapping is None and isinstance(last, dict):
        known = "; ".join(f"{name} ({', '.join(sorted(one.needs))})" for name, one in MAPPINGS.items())
        raise CogumiError(
            f"{source}: rows with the fields {', '.join(map(str, last)) or 'none'} fit no known mapping",
            f"rename fields, or name a mapping; known: {known}",
        )


def _label(file: str, folder: Path) -> str:
    path = Path(file)
    if "://" in file:
        return file
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
