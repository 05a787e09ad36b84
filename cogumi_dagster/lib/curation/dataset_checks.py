"""What the written dataset is held against: its files are read again and every claim is tested from scratch."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.curation.decontamination import decontaminate
from cogumi_dagster.lib.dedup.files import LONE_SURROGATE
from cogumi_dagster.lib.dedup.minhash import signatures
from cogumi_dagster.lib.jsonl import read_jsonl_tolerant
from cogumi_dagster.lib.profile import DOMAINS, DedupConfig
from cogumi_dagster.lib.tasks.base import DIFFICULTIES, split_of

RECHECK_BANDS = (20, 6)
"""datasketch's bands and rows for the second look: recall 0.998 at Jaccard 0.8, more than the 0.95 of the first."""
RECHECKED = 5_000
"""Of more records a sample is looked at: datasketch signs a few hundred a second."""
METADATA: Mapping[str, type] = {
    "domain": str, "difficulty": str, "teacher": str, "quality_score": float, "tokens": int, "source": str,
}  # fmt: skip


@dataclass(frozen=True)
class Verification:
    """Found in the files. All counts but ``records`` should be 0 and ``schema_valid`` 1.0.

    ``near_duplicates_left`` counts pairs at or above the threshold, found with datasketch and verified on sets of
    shingles; ``split_overlap`` prompts in two splits or in the wrong one; ``held_out`` prompts kept for evaluation
    (split test or listed).
    """

    records: int
    rechecked: int
    """Records of the second look for near-duplicates."""
    schema_valid: float
    near_duplicates_left: int
    contaminated: int
    split_overlap: int
    held_out: int

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        found = self.near_duplicates_left + self.contaminated + self.split_overlap + self.held_out
        return self.schema_valid == 1.0 and found == 0


def record_problem(record: Any) -> str | None:
    """The first way in which a record is not exactly ``{instruction, response, metadata{...}}``, or None."""
    if not isinstance(record, dict) or set(record) != {"instruction", "response", "metadata"}:
        return "its keys are not instruction, response and metadata"
    metadata = record["metadata"]
    if not isinstance(metadata, dict) or set(metadata) != set(METADATA):
        return f"its metadata's keys are not {', '.join(METADATA)}"
    for name in ("instruction", "response"):
        if not isinstance(record[name], str) or not record[name].strip():
            return f"{name} is empty or no text"
        if LONE_SURROGATE.search(record[name]):
            return f"{name} holds half a character, which UTF-8 cannot write"
    for name, kind in METADATA.items():
        if type(metadata[name]) is not kind:
            return f"metadata.{name} is {metadata[name]!r}, not {kind.__name__}"
    if metadata["domain"] not in DOMAINS:
        return f"metadata.domain is {metadata['domain']!r}"
    if metadata["difficulty"] not in DIFFICULTIES:
        return f"metadata.difficulty is {metadata['difficulty']!r}"
    if not 0.0 <= metadata["quality_score"] <= 10.0:
        return f"metadata.quality_score is {metadata['quality_score']}, not within 0 to 10"
    return None if metadata["tokens"] > 0 else f"metadata.tokens is {metadata['tokens']}"


def verify_dataset(
    folder: Path,
    config: DedupConfig,
    benchmark_prompts: Mapping[str, Sequence[str]],
    common_phrases: Sequence[str],
    held_out_prompts: Iterable[str] = (),
    splits: Sequence[str] = ("train", "validation"),
) -> Verification:
    """Read the ``splits`` of ``folder`` and test every claim.

    ``common_phrases`` are those of the contamination report: what was a template among all rows is one here.
    """
    by_split = {split: _read(folder, split) for split in splits}
    lines = sum(count for _, count in by_split.values())
    valid = [(split, record) for split, (records, _) in by_split.items() for record in records]
    records = [record for _, record in valid]
    prompts: dict[str, set[str]] = {split: set() for split in by_split}
    for split, record in valid:
        prompts[split].add(_words(record["instruction"]))
    everywhere = set().union(*prompts.values())
    twice = sum(map(len, prompts.values())) - len(everywhere)
    elsewhere = {_words(record["instruction"]) for split, record in valid if split_of(record["instruction"]) != split}
    in_test = {prompt for prompt in everywhere if split_of(prompt) not in splits}
    texts = _sample([f"{record['instruction']}\n{record['response']}" for record in records], config)
    return Verification(
        records=lines,
        rechecked=len(texts),
        schema_valid=len(valid) / lines if lines else 0.0,
        near_duplicates_left=near_duplicate_pairs(texts, config),
        contaminated=decontaminate(records, benchmark_prompts, common_phrases)[1].removed,
        split_overlap=max(twice, len(elsewhere)),
        held_out=len(in_test | (everywhere & set(map(_words, held_out_prompts)))),
    )


def _words(prompt: str) -> str:
    return " ".join(prompt.lower().split())


def _read(folder: Path, split: str) -> tuple[list[dict[str, Any]], int]:
    """The records of a split that are valid and the same in both files, and the lines there are."""
    import pyarrow.parquet as pq

    rows, report = read_jsonl_tolerant(folder / f"{split}.jsonl")
    twins = pq.read_table(folder / f"{split}.parquet").to_pylist()
    same = [row for row, twin in zip(rows, twins, strict=False) if row == twin and record_problem(row) is None]
    return same, max(report.rows + report.broken, len(twins))


def _sample(texts: Sequence[str], config: DedupConfig) -> Sequence[str]:
    """At most ``RECHECKED`` texts: those whose least shingle hash is smallest. Two near-duplicates have the same one
    with the probability of their similarity, so a pair is in the sample as a pair, where a random sample would hold
    one half of it."""
    if len(texts) <= RECHECKED:
        return texts
    least = signatures(texts, config.model_copy(update={"permutations": 1}))[:, 0]
    return [texts[number] for number in np.argsort(least, kind="stable")[:RECHECKED]]


def near_duplicate_pairs(texts: Sequence[str], config: DedupConfig) -> int:
    """Pairs at or above the threshold, by other code than that which removed them: datasketch and Python's sets."""
    from datasketch import MinHash, MinHashLSH

    bands, rows = RECHECK_BANDS
    index = MinHashLSH(num_perm=bands * rows, params=RECHECK_BANDS)
    shingled = [_shingles(text, config.shingle) for text in texts]
    encoded = ([shingle.encode("utf-8", "surrogatepass") for shingle in shingles] for shingles in shingled)
    pairs = 0
    for number, signature in enumerate(MinHash.generator(encoded, num_perm=bands * rows)):
        for other in index.query(signature):
            shared = len(shingled[number] & shingled[other])
            pairs += shared >= config.threshold * (len(shingled[number]) + len(shingled[other]) - shared)
        index.insert(number, signature, check_duplication=False)
    return pairs


def _shingles(text: str, size: int) -> set[str]:
    text = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return {text[start : start + size] for start in range(max(1, len(text) - size + 1))}
