"""The curation filters: each says why it drops a row, and the first reason wins.

In order: ``malformed``, ``quality``, ``pii``, ``offensive``, ``licence``, ``repetition``, ``tokens``, ``language``. The
cheap come first; tokens are counted for all rows still there at once; the language detector sees only texts that do
not read as plain English. Order decides only which reason is given, never which rows stay.
"""

import functools
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.curation.language import foreign_language, known_languages
from cogumi_dagster.lib.curation.pii import pii
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.profile import FilterConfig

log = logging.getLogger(__name__)

CountTokens = Callable[[list[str]], list[int]]
"""Tokens of each text, in the student's tokenizer."""

EXAMPLES_PER_REASON = 3
EXCERPT = 120
PRIVATE = ("pii", "offensive")
"""Reasons whose examples name the task but never quote it: a report must not spread what it removed."""


@dataclass(frozen=True)
class CurationReport:
    """Rows in and kept, drops by reason (``tokens:short``) and by filter (``tokens``), and a few examples of each
    reason as ``id: start of the prompt``. Token figures are of the kept rows."""

    rows: int
    kept: int
    dropped: dict[str, int]
    dropped_by_filter: dict[str, int]
    examples: dict[str, tuple[str, ...]]
    tokens_total: int
    tokens_min: int
    tokens_median: int
    tokens_max: int
    mean_quality: float | None


def curate(
    rows: Sequence[Mapping[str, Any]], config: FilterConfig, quality_threshold: float, count_tokens: CountTokens
) -> tuple[list[dict[str, Any]], CurationReport]:
    """The rows that pass every filter, each with ``tokens`` (of instruction and response), and the report.

    Raises:
        CogumiError: bounds that leave nothing, an unknown language code, a token counter that lost texts.
    """
    _check(config)
    reasons = [row_reason(row, quality_threshold) for row in rows]
    alive = [number for number, reason in enumerate(reasons) if reason is None]
    counts = count_tokens([f"{_prompt(rows[n])}\n{rows[n]['response']}" for n in alive])
    if len(counts) != len(alive):
        raise CogumiError(
            f"{len(counts)} token counts for {len(alive)} texts", "count_tokens must answer for each text"
        )
    tokens = dict(zip(alive, counts, strict=True))
    kept: list[dict[str, Any]] = []
    for number in alive:
        reasons[number] = _tokens(tokens[number], config) or _language(rows[number], config)
        if reasons[number] is None:
            kept.append({**rows[number], "tokens": tokens[number]})
    report = _report(rows, reasons, kept)
    log.info("curation: kept %d of %d rows; dropped %s", report.kept, report.rows, report.dropped_by_filter)
    return kept, report


def _check(config: FilterConfig) -> None:
    if config.min_tokens > config.max_tokens:
        raise CogumiError(
            f"filters: min_tokens {config.min_tokens} is above max_tokens {config.max_tokens}", "swap the two"
        )
    if not config.languages:
        raise CogumiError("filters: no language is allowed", "set filters.languages, for example to [en]")
    for code in config.languages:
        if code not in known_languages():
            raise CogumiError(f"filters: unknown language {code!r}", nearest(code, known_languages()))


def row_reason(row: Mapping[str, Any], quality_threshold: float) -> str | None:
    """Why a row is dropped before its tokens and language are looked at, or None."""
    reason = malformed(row) or _quality(row, quality_threshold)
    if reason:
        return reason
    text = f"{_prompt(row)}\n{row['response']}"
    return pii(text) or offensive(text) or licence(row["task"].get("licence"), text) or repetition(row["response"])


def _prompt(row: Mapping[str, Any]) -> str:
    return str(row["task"]["prompt"])


# --- malformed pairs and quality

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffd\ud800-\udfff]")
"""Control characters, the replacement character and half surrogates: signs of a decoding that went wrong."""
CHAT_MARKER = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text)\|>")
"""Tokens of a chat template inside a text would teach the student to write them."""


def malformed(row: Mapping[str, Any]) -> str | None:
    """A pair that is no pair: empty, cut off, an echo of its instruction, undecodable, with template tokens."""
    task, response = row.get("task"), row.get("response")
    if not isinstance(task, Mapping) or not isinstance(task.get("prompt"), str) or not task["prompt"].strip():
        return "malformed:empty-instruction"
    if not isinstance(response, str) or not response.strip():
        return "malformed:empty-response"
    prompt = task["prompt"]
    if row.get("finish_reason") == "length":
        return "malformed:truncated"
    if response.split() == prompt.split():
        return "malformed:echo"
    if CONTROL.search(prompt) or CONTROL.search(response):
        return "malformed:encoding"
    if CHAT_MARKER.search(prompt) or CHAT_MARKER.search(response):
        return "malformed:chat-template"
    if sum(line.lstrip().startswith("```") for line in response.splitlines()) % 2:
        return "malformed:open-code-fence"
    return None


def _quality(row: Mapping[str, Any], threshold: float) -> str | None:
    quality = row.get("quality")
    total = quality.get("total") if isinstance(quality, Mapping) else None
    if isinstance(total, bool) or not isinstance(total, int | float) or not math.isfinite(total):
        return "quality:unscored"  # never a score of 0.0 for "could not evaluate"
    return f"quality:{total:.1f}" if total < threshold else None


# --- offence

WORD = re.compile(r"[^\W\d_]+")
OFFENSIVE = Path(__file__).with_name("offensive.sha256")
"""The first 16 hex digits of SHA-256 of lower-case slurs that have no other meaning: a list nobody has to read."""


@functools.cache
def offensive_hashes() -> frozenset[str]:
    return frozenset(OFFENSIVE.read_text(encoding="ascii").split())


@functools.lru_cache(maxsize=1 << 17)
def _is_slur(word: str) -> bool:
    return hashlib.sha256(word.encode()).hexdigest()[:16] in offensive_hashes()


def offensive(text: str) -> str | None:
    """A slur, as a whole word."""
    return "offensive" if any(_is_slur(word) for word in set(WORD.findall(text.lower()))) else None


# --- licences

LICENCE_MARKERS = {
    "agpl-header": r"under the terms of the GNU Affero General Public|SPDX-License-Identifier:\s*AGPL",
    "gpl-header": r"under the terms of the GNU (?:Lesser )?General Public|SPDX-License-Identifier:\s*L?GPL",
    "non-commercial": r"SPDX-License-Identifier:\s*CC-BY-NC"
    r"|licensed under (?:a |the )?(?:Creative Commons|CC)[- ](?:Attribution|BY)[- ]NonCommercial",
    "all-rights-reserved": r"(?:copyright|\(c\)|©)[^\n]{0,80}all rights reserved",
    "confidential": r"proprietary and confidential|unauthori[sz]ed copying of this file",
}
"""Notices that travel with copied text. The mere name of a licence is a subject to write about."""
MARKERS = {name: re.compile(pattern, re.I) for name, pattern in LICENCE_MARKERS.items()}
PERMISSIVE = re.compile(
    r"redistribution and use in source and binary forms|apache license|permission is hereby granted", re.I
)
"""BSD's own header says "all rights reserved" too."""
DECLARED = re.compile(r"\b(?:(A?GPL)|CC[ -]BY(?:-SA)?-(N[CD])|(proprietary))", re.I)


def licence(declared: object, text: str) -> str | None:
    """A notice in the text, or a licence declared by the source, that forbids training a model to give away."""
    if isinstance(declared, str) and (match := DECLARED.search(declared)):
        return f"licence:declared-{next(filter(None, match.groups())).lower()}"
    for name, pattern in MARKERS.items():
        if pattern.search(text) and not (name == "all-rights-reserved" and PERMISSIVE.search(text)):
            return f"licence:{name}"
    return None


# --- repetition

TOP_NGRAM_LIMITS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE_NGRAM_LIMITS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
"""Rae et al. 2021 (Gopher, arXiv 2112.11446), table A1."""
GOPHER_MIN_WORDS = 50
"""Gopher's own lower bound on a document; its shares mean little on fewer words."""
SHORT_WORDS, SHORT_FACTOR = 300, 2.0
"""Gopher's n-gram limits are for web documents. Of 5,024 answers of 50 to 300 words (GSM8K, CodeAlpaca, HH-RLHF) they
drop 11 %, good solutions that repeat their terms; doubled, 0.5 %. A loop is far above either."""
LINE_MIN_WORDS = 4
"""Shorter lines (``return false;``, ``}``) repeat in any program."""
FENCED = re.compile(r"```.*?```", re.S)


def repetition(response: str) -> str | None:
    """Gopher's repetition rules on the prose of a response. Fenced code repeats by nature and is left out."""
    prose = FENCED.sub("\n", response)
    words = prose.split()
    if len(words) < GOPHER_MIN_WORDS:
        return None
    paragraphs = [part.strip() for part in re.split(r"\n{2,}", prose.strip())]
    share, characters = _duplicates(paragraphs)
    if share > DUPLICATE_PARAGRAPHS or characters > DUPLICATE_PARAGRAPH_CHARACTERS:
        return "repetition:paragraphs"
    share, characters = _duplicates(
        [line.strip() for line in prose.splitlines() if len(line.split()) >= LINE_MIN_WORDS]
    )
    if share > DUPLICATE_LINES or characters > DUPLICATE_LINE_CHARACTERS:
        return "repetition:lines"
    total = sum(map(len, words)) * (SHORT_FACTOR if len(words) < SHORT_WORDS else 1.0)
    for size, limit in TOP_NGRAM_LIMITS:
        gram, count = Counter(zip(*(words[start:] for start in range(size)), strict=False)).most_common(1)[0]
        if count == 1:
            return None  # no pair of words comes twice, so no longer n-gram does
        if count * sum(map(len, gram)) > limit * total:
            return f"repetition:top-{size}-gram"
    for size, limit in DUPLICATE_NGRAM_LIMITS:
        repeated = _repeated_characters(words, size)
        if not repeated:
            return None
        if repeated > limit * total:
            return f"repetition:duplicate-{size}-grams"
    return None


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """The share of parts that came before, and their share of the characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def _repeated_characters(words: list[str], size: int) -> int:
    """Characters of word n-grams that came before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    place = characters = 0
    while place + size <= len(words):
        gram = tuple(words[place : place + size])
        if gram in seen:
            characters += sum(map(len, gram))
            place += size
        else:
            seen.add(gram)
            place += 1
    return characters


# --- tokens and language


def _tokens(count: int, config: FilterConfig) -> str | None:
    if count < config.min_tokens:
        return "tokens:short"
    return "tokens:long" if count > config.max_tokens else None


def _language(row: Mapping[str, Any], config: FilterConfig) -> str | None:
    # Each side alone: an English question answered in French is half English.
    code = foreign_language(row["response"], config.languages) or foreign_language(_prompt(row), config.languages)
    return f"language:{code}" if code else None


def _report(
    rows: Sequence[Mapping[str, Any]], reasons: Sequence[str | None], kept: Sequence[Mapping[str, Any]]
) -> CurationReport:
    dropped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for row, reason in zip(rows, reasons, strict=True):
        if reason is None:
            continue
        dropped[reason] += 1
        shown = examples.setdefault(reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            shown.append(_example(row, reason))
    by_filter: Counter[str] = Counter()
    for reason, count in dropped.items():
        by_filter[reason.partition(":")[0]] += count
    tokens = sorted(row["tokens"] for row in kept)
    return CurationReport(
        rows=len(rows),
        kept=len(kept),
        dropped=dict(sorted(dropped.items())),
        dropped_by_filter=dict(sorted(by_filter.items())),
        examples={reason: tuple(shown) for reason, shown in sorted(examples.items())},
        tokens_total=sum(tokens),
        tokens_min=tokens[0] if tokens else 0,
        tokens_median=tokens[len(tokens) // 2] if tokens else 0,
        tokens_max=tokens[-1] if tokens else 0,
        mean_quality=round(sum(row["quality"]["total"] for row in kept) / len(kept), 3) if kept else None,
    )


def _example(row: Mapping[str, Any], reason: str) -> str:
    task = row.get("task")
    task = task if isinstance(task, Mapping) else {}
    identity = str(task.get("id", "no id"))
    if reason.partition(":")[0] in PRIVATE:
        return identity
    return f"{identity}: {' '.join(str(task.get('prompt', '')).split())[:EXCERPT]}"
