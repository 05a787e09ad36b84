"""Datasets of the Hugging Face hub (or a local folder of that form), streamed through ``datasets``."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cogumi_dagster.lib.curation.files import Numbered
from cogumi_dagster.lib.curation.mappings import KNOWN_DATASETS, mapping_named
from cogumi_dagster.lib.curation.records import SourceRecord, Tally, records_of
from cogumi_dagster.lib.errors import CogumiError

ROWS = 50_000
"""Rows read of a dataset without a limit. OpenOrca has 4.2 million."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset by name. ``mapping`` and ``licence`` of known ones are filled in; ``revision`` pins a commit or tag."""

    name: str
    mapping: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    licence: str | None = None
    limit: int = ROWS
    weight: float = 1.0


def read_dataset(dataset: HubDataset, domain: str | None = None, tally: Tally | None = None) -> Iterator[SourceRecord]:
    """The first ``limit`` records of a dataset, with the commit that they were read from.

    Raises:
        CogumiError: the hub cannot be reached, no such dataset, revision or split, rows that fit no mapping.
    """
    known = KNOWN_DATASETS.get(dataset.name)
    name = dataset.mapping or (known.mapping if known else None)
    licence = dataset.licence or (known.licence if known else None)
    mapping = mapping_named(name) if name else None
    stream, revision = _opened(dataset)
    rows = _numbered(dataset, stream)
    yield from records_of(rows, dataset.name, mapping, domain, licence=licence, revision=revision, tally=tally)


def _opened(dataset: HubDataset) -> tuple[Any, str | None]:
    try:
        from datasets import load_dataset_builder

        builder = load_dataset_builder(dataset.name, dataset.config, revision=dataset.revision)
        stream = builder.as_streaming_dataset(split=dataset.split)
    except Exception as error:  # whatever the hub's client and its file systems raise
        raise _explained(dataset, error) from error
    _, at, commit = str(builder.base_path).partition("@")
    return stream, commit.partition("/")[0] if at else dataset.revision


def _numbered(dataset: HubDataset, stream: Any) -> Iterator[Numbered]:
    rows = enumerate(islice(stream, dataset.limit), 1)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _explained(dataset, error) from error
        if row is None:
            return
        yield row


def _explained(dataset: HubDataset, error: Exception) -> CogumiError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    lost = isinstance(error, ConnectionError | TimeoutError)
    mend = "check the network" if lost else "check name, config, split and revision, and HF_TOKEN where it is gated"
    return CogumiError(f"dataset {dataset.name!r}: {said}", f"{mend}, or download it and name its folder",
                       retryable=lost)  # fmt: skip
