"""Take out of the training data what the benchmarks ask.

Two rules, either is enough:

- *word overlap*, as in GPT-3 (Brown et al. 2020, appendix C): a row shares 13 consecutive words with a prompt,
  case and punctuation ignored. A prompt of 8 to 12 words must be there whole; a shorter one must be the instruction.
  An overlap found in more than 10 rows is a common phrase or a template, and ignored; the whole of a prompt never is.
- *near-duplicate*: instruction and prompt have a Jaccard similarity of at least 0.8 (character 3-grams, verified).
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogumi_dagster.lib.dedup.minhash import jaccard, lsh_keys, normalise, shingle_set, signatures
from cogumi_dagster.lib.profile import DedupConfig

log = logging.getLogger(__name__)

NGRAM, MIN_NGRAM, COMMON_ROWS = 13, 8, 10
"""GPT-3, appendix C: n-grams of 13 words, 8 at least; those with more than 10 matches are common phrases."""
NEAR = DedupConfig(threshold=0.8, shingle=3, permutations=120, bands=20)
"""20 bands of 6 rows find a pair at Jaccard 0.8 with probability 0.998: a missed leak costs more than a comparison."""
EXCERPT = 120
WORD = re.compile(r"[^\W_]+")

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Contaminated:
    """A removed row: which benchmark, which rule (``words`` or ``near-duplicate``), and what they share."""

    id: str
    benchmark: str
    rule: str
    instruction: str
    benchmark_prompt: str
    similarity: float | None


@dataclass(frozen=True)
class ContaminationReport:
    """Rows in and removed, by benchmark and by rule, each of the removed, and the word sequences that were ignored."""

    rows: int
    removed: int
    benchmark_prompts: dict[str, int]
    by_benchmark: dict[str, int]
    by_rule: dict[str, int]
    contaminated: tuple[Contaminated, ...]
    common_phrases: tuple[str, ...]


@dataclass(frozen=True)
class _Index:
    """Benchmark prompts by their word sequences. Prompts are numbered over all benchmarks."""

    prompts: list[tuple[str, str]]  # (benchmark, prompt)
    grams: dict[int, dict[Gram, list[int]]]  # length -> sequence -> prompts that hold it
    whole: dict[Gram, int]  # prompts under MIN_NGRAM words
    grams_of: list[int]  # distinct sequences of each prompt


def words_of(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def _index(benchmark_prompts: Mapping[str, Sequence[str]]) -> _Index:
    prompts = [(name, prompt) for name in sorted(benchmark_prompts) for prompt in benchmark_prompts[name]]
    grams: dict[int, dict[Gram, list[int]]] = defaultdict(lambda: defaultdict(list))
    whole: dict[Gram, int] = {}
    grams_of: list[int] = []
    for number, (_, prompt) in enumerate(prompts):
        words = words_of(prompt)
        size = min(NGRAM, len(words))
        if size < MIN_NGRAM:
            if words:
                whole.setdefault(tuple(words), number)
            grams_of.append(0)
            continue
        distinct = _grams(words, size)
        for gram in distinct:
            grams[size][gram].append(number)
        grams_of.append(len(distinct))
    return _Index(prompts, grams, whole, grams_of)


def _grams(words: list[str], size: int) -> set[Gram]:
    return set(zip(*(words[start:] for start in range(size)), strict=False))


def decontaminate(
    rows: Sequence[Mapping[str, Any]],
    benchmark_prompts: Mapping[str, Sequence[str]],
    common_phrases: Sequence[str] | None = None,
) -> tuple[list[Mapping[str, Any]], ContaminationReport]:
    """The rows that share nothing with the benchmarks, in order, and the report.

    Args:
        rows: response rows, or records with ``instruction`` and ``response``.
        benchmark_prompts: benchmark name -> its prompts.
        common_phrases: the ignored word sequences of an earlier report. Given, no others are ignored: a part of a
            corpus is then judged as the whole was. Left out, they are counted in ``rows``.
    """
    index = _index(benchmark_prompts)
    asked = [_instruction(row) for row in rows]
    found: dict[int, tuple[int, str, float | None]] = _near_duplicates(asked, index)
    hits: dict[int, dict[Gram, list[int]]] = {}
    for number, row in enumerate(rows):
        if number in found:
            continue
        alike = index.whole.get(tuple(words_of(asked[number])))
        if alike is not None:
            found[number] = (alike, "words", None)
        elif hit := _overlaps(asked[number], str(row.get("response") or ""), index):
            hits[number] = hit
    if common_phrases is None:
        in_rows = Counter(gram for hit in hits.values() for gram in hit)
        common = {gram for gram, count in in_rows.items() if count > COMMON_ROWS}
    else:
        common = {tuple(phrase.split()) for phrase in common_phrases}
    for number, hit in hits.items():
        prompt = _guilty(hit, common, index)
        if prompt is not None:
            found[number] = (prompt, "words", None)
    kept = [row for number, row in enumerate(rows) if number not in found]
    report = _report(rows, asked, found, common, index, benchmark_prompts)
    log.info("decontamination: removed %d of %d rows %s", report.removed, report.rows, report.by_benchmark)
    return kept, report


def _instruction(row: Mapping[str, Any]) -> str:
    task = row.get("task")
    return str(task["prompt"] if isinstance(task, Mapping) else row["instruction"])


def _overlaps(instruction: str, response: str, index: _Index) -> dict[Gram, list[int]]:
    """Benchmark word sequences in a row, each with the prompts that hold it."""
    hit: dict[Gram, list[int]] = {}
    for words in (words_of(instruction), words_of(response)):
        for size, known in index.grams.items():
            for gram in _grams(words, size) & known.keys():
                hit[gram] = known[gram]
    return hit


def _guilty(hit: Mapping[Gram, list[int]], common: set[Gram], index: _Index) -> int | None:
    """The prompt that a row leaks: one that it holds whole, or else one it shares an uncommon sequence with."""
    shared = Counter(prompt for prompts in hit.values() for prompt in prompts)
    whole = [prompt for prompt, count in shared.items() if count == index.grams_of[prompt]]
    partly = [prompt for gram, prompts in hit.items() if gram not in common for prompt in prompts]
    return min(whole or partly, default=None)


def _near_duplicates(asked: Sequence[str], index: _Index) -> dict[int, tuple[int, str, float | None]]:
    """Instructions that are verified near-duplicates of a benchmark prompt: row -> (prompt, rule, similarity)."""
    if not asked or not index.prompts:
        return {}
    known = [normalise(prompt) for _, prompt in index.prompts]
    mine = [normalise(text) for text in asked]
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for band, column in enumerate(lsh_keys(signatures(known, NEAR), NEAR).tolist()):
        for prompt, key in enumerate(column):
            buckets[band, key].append(prompt)
    candidates: dict[int, set[int]] = defaultdict(set)
    for band, column in enumerate(lsh_keys(signatures(mine, NEAR), NEAR).tolist()):
        for row, key in enumerate(column):
            if (band, key) in buckets:
                candidates[row].update(buckets[band, key])
    sets = {prompt: shingle_set(known[prompt], NEAR.shingle) for prompt in set().union(*candidates.values())}
    found: dict[int, tuple[int, str, float | None]] = {}
    for row, prompts in candidates.items():
        own = shingle_set(mine[row], NEAR.shingle)
        similarity, prompt = max((jaccard(own, sets[prompt]), -prompt) for prompt in prompts)
        if similarity >= NEAR.threshold:
            found[row] = (-prompt, "near-duplicate", round(similarity, 4))
    return found


def _report(
    rows: Sequence[Mapping[str, Any]],
    asked: Sequence[str],
    found: Mapping[int, tuple[int, str, float | None]],
    common: set[Gram],
    index: _Index,
    benchmark_prompts: Mapping[str, Sequence[str]],
) -> ContaminationReport:
    contaminated = []
    for number, (prompt, rule, similarity) in sorted(found.items()):
        task = rows[number].get("task")
        name, text = index.prompts[prompt]
        identity = str(task.get("id", number)) if isinstance(task, Mapping) else str(number)
        excerpts = asked[number][:EXCERPT], text[:EXCERPT]
        contaminated.append(Contaminated(identity, name, rule, *excerpts, similarity))
    return ContaminationReport(
        rows=len(rows),
        removed=len(contaminated),
        benchmark_prompts={name: len(benchmark_prompts[name]) for name in sorted(benchmark_prompts)},
        by_benchmark=dict(sorted(Counter(item.benchmark for item in contaminated).items())),
        by_rule=dict(sorted(Counter(item.rule for item in contaminated).items())),
        contaminated=tuple(contaminated),
        common_phrases=tuple(sorted(" ".join(gram) for gram in common)),
    )
