"""The parity chain: from the trained adapter to the served answer, each link held against the one before it.

Eight links: student + adapter, merged, pruned and recovered, AWQ parent, GGUF in f16, quantized, unpacked, served.
Pruning and quantization may lose; every other link must compute the same function of the same ids. Where one does not,
the report names the link and what its text, weights and metadata say of the cause.
"""

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.compression.package import unpack
from cogumi_dagster.lib.evaluation import parity_causes as causes
from cogumi_dagster.lib.evaluation.gguf_logits import Outputs
from cogumi_dagster.lib.evaluation.parity_links import (
    Observed,
    first_tokens,
    observe_checkpoint,
    observe_gguf,
    observe_served,
)
from cogumi_dagster.lib.evaluation.statistics import SIGNIFICANCE, Proportion, mcnemar
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks import draw_tasks, verify
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import ParityReport, parity, perplexity_of

LINKS = ("adapter", "merged", "recovered", "awq", "gguf_f16", "quantized", "unpacked", "served")
MAY_LOSE = ("recovered", "quantized")
FAMILIES = (
    "chain_sum", "products", "simple_equations", "science_units", "fraction_simplification", "code_value",
)  # fmt: skip
"""Families with short prompts and solutions."""
BENCHMARK_SEED = 20_260_601
"""Of the fixed benchmark: the same tasks in every run, of the split that nothing is trained on."""
LONGEST_SOLUTION = 56
"""Characters. Decoding is what the chain spends most of its time on."""
BROKEN_KL, BROKEN_SERVED_KL = 1e-2, 5e-2
"""Mean KL (nats a token) from which a link that must be equal counts as broken. On SmolLM2-135M merging into bfloat16
costs 3e-3, the f16 GGUF 2e-6, and the server 2e-3; its tokens are few."""


@dataclass(frozen=True)
class Chain:
    """Where the links are: checkpoints, the adapter, the quantized GGUF and its package.

    ``gguf_f16`` is written from ``awq`` where it is None.
    """

    student: Path
    adapter: Path
    merged: Path
    recovered: Path
    awq: Path
    quantized: Path
    package: Path
    gguf_f16: Path | None = None


@dataclass(frozen=True)
class Link:
    """One link. Divergences (KL, nats a token) are from the previous link and from the first, on the solutions."""

    link: str
    must_equal: bool
    prompts: int
    same_ids: int
    """Prompts whose ids are the previous link's; of the served link, whose number of ids is."""
    tokens: int
    """On which log-probabilities are compared: of the served link, the first of each answer."""
    mean_kl: float
    max_kl: float
    mean_kl_first: float
    max_kl_first: float
    perplexity: float | None
    """Of the solutions; None for the served link, whose tokens are too few."""
    score: Proportion
    same_answers: int
    """Greedy answers that are the previous link's, letter by letter."""
    problem: str
    """What is broken, and the likely cause; empty where nothing is."""
    seconds: float


@dataclass(frozen=True)
class ChainReport:
    benchmark: str
    links: tuple[Link, ...]
    same_ids: Proportion
    """Over all links and prompts."""
    score_p_value: float | None
    """Of the first link's answers against the served ones, McNemar's exact test; below 0.05 the score has changed. None
    with fewer tasks than could ever show it."""
    broken: str
    """Names of the broken links, in order."""


def check_chain(chain: Chain, out: Path, *, tasks: int, progress: Progress = silent) -> ChainReport:
    """Measure all links on ``tasks`` tasks of the fixed benchmark; write what each answered to ``out/answers.json``.

    Raises:
        CogumiError: a link cannot be opened.
    """
    from transformers import AutoTokenizer

    drawn = benchmark(tasks)
    pairs = [Pair(task.prompt, task.solution or "", task.family) for task in drawn]
    shared = AutoTokenizer.from_pretrained(chain.student, local_files_only=True)
    links: list[Link] = []
    answers: dict[str, list[str]] = {}
    first: Observed | None = None
    previous: Observed | None = None
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        files = _Files(chain, Path(folder))
        for name in LINKS:
            started = time.perf_counter()
            seen = _observe(name, files, pairs, shared, previous)
            first, previous = first or seen, previous or seen
            link = _held(name, seen, previous, first, pairs, shared)
            passed = [bool(verify(task, answer).passed) for task, answer in zip(drawn, seen.answers, strict=True)]
            link = replace(
                link,
                score=Proportion.of(passed),
                problem=_problem(link, seen, previous, files),
                seconds=time.perf_counter() - started,
            )
            links.append(link)
            answers[name], previous = seen.answers, seen
            progress(len(links), len(LINKS), link.problem or f"{name}: KL {link.mean_kl:.1e}")
    (out / "answers.json").write_text(json.dumps(_by_task(drawn, answers), indent=1, ensure_ascii=False))
    return ChainReport(
        benchmark=f"{len(drawn)} tasks of {', '.join(FAMILIES)}; seed {BENCHMARK_SEED}, split test",
        links=tuple(links),
        same_ids=Proportion(sum(link.same_ids for link in links), sum(link.prompts for link in links)),
        score_p_value=_p_value(drawn, answers[LINKS[0]], answers[LINKS[-1]]),
        broken=", ".join(link.link for link in links if link.problem),
    )


def benchmark(count: int) -> list[Task]:
    """The fixed benchmark of that size: tasks with short solutions, the easier first; nothing is trained on them."""
    drawn = draw_tasks(FAMILIES, 4 * count, BENCHMARK_SEED, "test")
    return [task for task in drawn if len(task.solution or "") <= LONGEST_SOLUTION][:count]


class _Files:
    """The chain's GGUF files, those that exist only here included."""

    def __init__(self, chain: Chain, scratch: Path) -> None:
        self.chain = chain
        self.unpacked = scratch / "unpacked.gguf"
        self.f16 = chain.gguf_f16 or scratch / "f16.gguf"
        self.gguf = {
            "gguf_f16": self.f16, "quantized": chain.quantized, "unpacked": self.unpacked, "served": self.unpacked,
        }  # fmt: skip


def _observe(name: str, files: _Files, pairs: Sequence[Pair], shared: Any, previous: Observed | None) -> Observed:
    chain = files.chain
    if name == "adapter":
        return observe_checkpoint(chain.student, pairs, shared, adapter=chain.adapter)
    if name in ("merged", "recovered", "awq"):
        return observe_checkpoint(getattr(chain, name), pairs, shared)
    if name == "served":
        assert previous is not None
        return observe_served(files.unpacked, pairs, shared, previous.outputs[0][0].shape[1])
    if name == "gguf_f16" and chain.gguf_f16 is None:
        write_gguf(chain.awq, files.f16)
    if name == "unpacked":
        unpack(chain.package, files.unpacked)
        if previous and _same_bytes(files):  # the same measurement: not made twice
            return previous
    return observe_gguf(files.gguf[name], pairs, shared)


def _same_bytes(files: _Files) -> bool:
    return file_sha256(files.unpacked) == file_sha256(files.chain.quantized)


def _held(name: str, seen: Observed, previous: Observed, first: Observed, pairs: Sequence[Pair], shared: Any) -> Link:
    """A link's figures against the previous link and the first."""
    before, origin = previous.outputs, first.outputs
    if name == "served":
        before, origin = first_tokens(before, shared, pairs), first_tokens(origin, shared, pairs)
    last, all_along = _divergence(before, seen.outputs), _divergence(origin, seen.outputs)
    mine, right = (seen.ids, previous.ids) if seen.ids else (seen.prompt_tokens, previous.prompt_tokens)
    return Link(
        link=name,
        must_equal=name not in MAY_LOSE,
        prompts=len(pairs),
        same_ids=sum(a == b for a, b in zip(mine, right, strict=True)),
        tokens=last.tokens,
        mean_kl=last.mean_kl,
        max_kl=last.max_kl,
        mean_kl_first=all_along.mean_kl,
        max_kl_first=all_along.max_kl,
        perplexity=None if name == "served" else perplexity_of(seen.outputs)[0],
        score=Proportion(0, 0),
        same_answers=sum(a == b for a, b in zip(seen.answers, previous.answers, strict=True)),
        problem="",
        seconds=0.0,
    )


def _divergence(reference: Outputs, other: Outputs) -> ParityReport:
    """``parity``; not a number where the vocabularies have different sizes."""
    ((first, _),), ((second, _),) = reference, other
    if first.shape != second.shape:
        return ParityReport(len(second), math.nan, math.nan, math.nan)
    return parity(reference, other)


def _problem(link: Link, seen: Observed, previous: Observed, files: _Files) -> str:
    """What is broken and why, or nothing."""
    chain, name = files.chain, link.link
    if link.same_ids < link.prompts:
        found = f"{link.prompts - link.same_ids} of {link.prompts} prompts have other token ids"
        return f"{found}: {causes.of_ids(seen, previous, files.gguf.get(name))}"
    if name == "unpacked" and not _same_bytes(files):
        return "the package unpacks to another file than the quantized one: pack it again"
    if not link.must_equal or link.mean_kl <= (BROKEN_SERVED_KL if name == "served" else BROKEN_KL):
        return ""
    cause = {
        "merged": lambda: causes.of_merge(chain.student, chain.adapter, chain.merged),
        "awq": lambda: causes.of_folding(chain.recovered, chain.awq),
        "gguf_f16": lambda: causes.of_export(chain.awq, files.f16),
        "served": lambda: "the server's prompt differs at the same length, or an adapter is applied to the base",
    }.get(name, lambda: "its logits are not numbers, or of another shape")
    return f"another function: mean KL {link.mean_kl:.2g} nats a token: {cause()}"


def _by_task(tasks: Sequence[Task], answers: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {"prompt": task.prompt, "solution": task.solution, **{link: texts[n] for link, texts in answers.items()}}
        for n, task in enumerate(tasks)
    ]


def _p_value(tasks: Sequence[Task], before: Sequence[str], after: Sequence[str]) -> float | None:
    if mcnemar(len(tasks), 0) >= SIGNIFICANCE:
        return None
    pairs = [
        (bool(verify(task, one).passed), bool(verify(task, other).passed))
        for task, one, other in zip(tasks, before, after, strict=True)
    ]
    return mcnemar(pairs.count((True, False)), pairs.count((False, True)))
