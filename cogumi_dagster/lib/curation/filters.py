"""The curation filters: each says why it drops a row, and the first reason wins.

In order: ``malformed``, ``quality``, ``pii``, ``offensive``, ``licence``, ``copy``, ``repetition``, ``tokens``,
``language``. The cheap come first, for many rows in several processes; tokens are counted while the next rows are
looked at; the language detector sees only texts that do not read as plain English. Order decides only which reason is
given, never which rows stay, and the number of processes decides nothing.
"""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

from cogumi_dagster.lib.curation.copies import copies
from cogumi_dagster.lib.curation.language import detect, doubtful_prose, known_languages
from cogumi_dagster.lib.curation.licences import licence
from cogumi_dagster.lib.curation.offence import offensive
from cogumi_dagster.lib.curation.pii import pii
from cogumi_dagster.lib.curation.repetition import repetition
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.profile import FilterConfig

log = logging.getLogger(__name__)

CountTokens = Callable[[list[str]], list[int]]
"""Tokens of each text, in the student's tokenizer."""

PARALLEL_FROM = 20_000
"""Rows from which more processes pay: starting them takes about a second."""
CHUNK = 2_000
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
    rows: Sequence[Mapping[str, Any]],
    config: FilterConfig,
    quality_threshold: float,
    count_tokens: CountTokens,
    workers: int | None = None,
) -> tuple[list[dict[str, Any]], CurationReport]:
    """The rows that pass every filter, each with ``tokens`` (of instruction and response), and the report.

    ``workers`` are processes for the filters that look at texts; left out, one for each core where it pays.

    Raises:
        CogumiError: bounds that leave nothing, an unknown language code, a token counter that lost texts.
    """
    _check(config)
    reasons: list[str | None] = []
    doubtful: list[tuple[int, str]] = []
    tokens: dict[int, int] = {}
    for verdicts in _text_verdicts(rows, config, quality_threshold, workers):
        first = len(reasons)
        reasons += [reason for reason, _ in verdicts]
        alive = [first + place for place, (reason, _) in enumerate(verdicts) if reason is None]
        tokens.update(zip(alive, _counted([rows[n] for n in alive], count_tokens), strict=True))
        for number in alive:
            reasons[number] = _tokens(tokens[number], config)
            if reasons[number] is None:
                doubtful += [(number, prose) for prose in verdicts[number - first][1]]
    for (number, _), code in zip(doubtful, detect([prose for _, prose in doubtful], config.languages), strict=True):
        if code and reasons[number] is None:
            reasons[number] = f"language:{code}"
    kept = [{**rows[n], "tokens": count} for n, count in tokens.items() if reasons[n] is None]
    report = _report(rows, reasons, kept)
    log.info("curation: kept %d of %d rows; dropped %s", report.kept, report.rows, report.dropped_by_filter)
    return kept, report


def _counted(rows: Sequence[Mapping[str, Any]], count_tokens: CountTokens) -> list[int]:
    counts = count_tokens([f"{_prompt(row)}\n{row['response']}" for row in rows])
    if len(counts) != len(rows):
        raise CogumiError(f"{len(counts)} token counts for {len(rows)} texts", "count_tokens must answer for each text")
    return counts


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


Verdict = tuple[str | None, tuple[str, ...]]
"""Why a row is dropped before its tokens are counted, or None; and the prose whose language must be asked. Response and
prompt are apart: an English question answered in French is half English."""


def _text_verdicts(
    rows: Sequence[Mapping[str, Any]], config: FilterConfig, threshold: float, workers: int | None
) -> Iterator[list[Verdict]]:
    """Verdicts on the rows, in order, a chunk at a time."""
    judge = partial(_chunk_verdicts, config=config, threshold=threshold)
    workers = workers or (len(os.sched_getaffinity(0)) if len(rows) >= PARALLEL_FROM else 1)
    starts = range(0, len(rows), CHUNK)
    if workers == 1:
        yield from (judge(rows[start : start + CHUNK]) for start in starts)
        return
    chunks = [[_slim(row) for row in rows[start : start + CHUNK]] for start in starts]
    # Spawned, not forked: the parent has the tokenizer's threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(judge, chunks)


def _slim(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the filters read of a row, for another process."""
    task = row.get("task")
    slim = {key: row.get(key) for key in ("response", "quality", "finish_reason")}
    return slim | {"task": {key: task.get(key) for key in ("prompt", "licence")} if isinstance(task, Mapping) else None}


def _chunk_verdicts(rows: Sequence[Mapping[str, Any]], config: FilterConfig, threshold: float) -> list[Verdict]:
    return [_verdict(row, config, threshold) for row in rows]


def _verdict(row: Mapping[str, Any], config: FilterConfig, threshold: float) -> Verdict:
    if reason := malformed(row) or _quality(row, threshold):
        return reason, ()
    prompt, response = _prompt(row), row["response"]
    text = f"{prompt}\n{response}"
    reason = (
        pii(text)
        or offensive(text)
        or licence(row["task"].get("licence"), text, config.licences)
        or copies(prompt, response)
        or repetition(response)
    )
    if reason:
        return reason, ()
    return None, tuple(filter(None, (doubtful_prose(side, config.languages) for side in (response, prompt))))


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
    if any("<|" in text and CHAT_MARKER.search(text) for text in (prompt, response)):
        return "malformed:chat-template"
    if "```" in response and sum(line.lstrip().startswith("```") for line in response.splitlines()) % 2:
        return "malformed:open-code-fence"
    return None


def _quality(row: Mapping[str, Any], threshold: float) -> str | None:
    quality = row.get("quality")
    total = quality.get("total") if isinstance(quality, Mapping) else None
    if isinstance(total, bool) or not isinstance(total, int | float) or not math.isfinite(total):
        return "quality:unscored"  # never a score of 0.0 for "could not evaluate"
    return f"quality:{total:.1f}" if total < threshold else None


# --- tokens and language


def _tokens(count: int, config: FilterConfig) -> str | None:
    if count < config.min_tokens:
        return "tokens:short"
    return "tokens:long" if count > config.max_tokens else None


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
