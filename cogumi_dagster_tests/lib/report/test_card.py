import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.artifacts import ArtifactRef, ArtifactStore
from cogumi_dagster.lib.evaluation.statistics import Proportion, report_json
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.profile import Profile
from cogumi_dagster.lib.report.card import HTML, MARKDOWN, STEPS, write_card
from cogumi_dagster.lib.report.cells import number, proportion, size
from cogumi_dagster.lib.report.figures import figures, reports_of
from cogumi_dagster.lib.report.one_for_all import one_for_all
from cogumi_dagster.lib.report.tables import Reports, one_for_all_table, strategy_tables
from cogumi_dagster.lib.training.batches import Pair

EVIL = "<script>alert('x')</script> & | \"q\""


def check(name: str, *, passed: bool = True, blocking: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "check": name, "value": 0.5, "bound": "at least", "threshold": 0.7, "passed": passed, "blocking": blocking,
        "description": f"says {name}", **more,
    }  # fmt: skip


def share(successes: int, count: int) -> dict[str, Any]:
    return Proportion(successes, count).to_json()


@pytest.fixture
def refs(tmp_path: Path) -> list[ArtifactRef]:
    store = ArtifactStore(tmp_path / "store")
    reports: dict[tuple[str, str | None], dict[str, Any]] = {
        ("student_model", None): {"name": EVIL, "parameters": 1234567, "stand_in": True, "source": EVIL},
        ("base_adapter", None): {"curve": [[1, 2.0], [2, 1.5]]},
        ("modifier_evaluation", "code"): {
            "base": share(3, 10), "modified": share(7, 10), "repaired": share(4, 7), "kept": share(3, 3),
            "p_value": 0.125, "gate_passed": False,
        },
        ("teacher_responses", "math"): {"stand_ins": [EVIL]},
    }  # fmt: skip
    checks = {
        "student_model": [check("tokenizer_is_exact"), check(EVIL, passed=False, description=EVIL)],
        "modifier_evaluation": [
            check("repairs", passed=False, blocking=False, interval=[0.2, 0.8]),
            check("n", value=None),
        ],
    }
    made = []
    for (asset, partition), report in reports.items():
        with store.write(asset, partition) as draft:
            (draft.path / "f").write_text(asset)
            draft.metrics.update(report=report, checks=checks.get(asset, []))
        assert draft.ref is not None
        made.append(draft.ref)
    return made


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(out: Path) -> Tags:
    tags = Tags()
    tags.feed((out / HTML).read_text())
    return tags


def test_the_page_escapes_what_artifacts_say_and_needs_nothing_else(refs: list[ArtifactRef], tmp_path: Path) -> None:
    write_card(refs, Profile(name="x", description=EVIL), tmp_path / "out")
    tags = parse(tmp_path / "out")
    assert "script" not in tags.names
    assert tags.text.count(EVIL) >= 5, "the text itself is there: name, check, description, stand-ins, profile"
    assert not {"img", "link", "iframe"} & set(tags.names)
    assert not [v for k, v in tags.attributes if k in ("src", "href") and v and not v.startswith("#")]


def test_all_checks_are_there_with_figure_bound_and_verdict(refs: list[ArtifactRef], tmp_path: Path) -> None:
    report = write_card(refs, Profile(name="x"), tmp_path / "out")
    assert (report.checks, report.passed, report.artifacts) == (4, 2, 4)
    assert report.missing == len(STEPS) - 1
    text = parse(tmp_path / "out").text
    markdown = (tmp_path / "out" / MARKDOWN).read_text()
    for ref in refs:
        for one in ref.manifest.metrics["checks"]:
            assert one["check"] in text and one["description"] in text
    assert (
        "| modifier_evaluation[code] | repairs | 0.5 (0.20 to 0.80) | at least 0.7 | warn | says repairs |" in markdown
    )
    assert "| modifier_evaluation[code] | n | not evaluated | at least 0.7 | pass | says n |" in markdown
    assert "| fail |" in markdown
    assert "0.300 (3 of 10; 0.11 to 0.60)" in markdown and "not passed" in markdown


def test_stand_ins_are_named(refs: list[ArtifactRef], tmp_path: Path) -> None:
    assert write_card(refs, Profile(name="x"), tmp_path / "out").stand_ins == f"student: {EVIL}, teacher: {EVIL}"


def test_siblings_are_counted_and_named_as_the_solvers(tmp_path: Path) -> None:
    with ArtifactStore(tmp_path / "store").write("cascade_examples", "reasoning") as draft:
        (draft.path / "f").write_text("rows")
        draft.metrics.update(report={"tiers": [], "stand_ins": [], "siblings": 3}, checks=[])
    assert draft.ref is not None
    report = write_card([draft.ref], Profile(name="x"), tmp_path / "out")
    assert report.stand_ins == "siblings of failures: solver"
    assert "taught besides: reasoning 3." in (tmp_path / "out" / HTML).read_text()


def test_markdown_rows_keep_their_columns(refs: list[ArtifactRef], tmp_path: Path) -> None:
    write_card(refs, Profile(name="x"), tmp_path / "out")
    table: list[str] = []
    for line in [*(tmp_path / "out" / MARKDOWN).read_text().splitlines(), ""]:
        if line.startswith("| "):
            table.append(line)
        else:
            assert len({row.replace("\\|", "").count("|") for row in table}) <= 1
            table = []


def test_the_figures_that_are_there_are_drawn(refs: list[ArtifactRef]) -> None:
    drawn = figures(reports_of(refs))
    assert [caption.split(",")[0] for caption, _ in drawn] == [
        "Training loss of every adapter", "Held-out tasks of each modifier's domains",
    ]  # fmt: skip
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") for _, svg in drawn)
    assert figures({}) == []


def test_an_empty_store_makes_an_empty_report(tmp_path: Path) -> None:
    report = write_card([], Profile(name="x"), tmp_path / "out")
    assert (report.artifacts, report.checks, report.plots, report.missing) == (0, 0, 0, len(STEPS))


def test_figures_are_written_as_people_read_them() -> None:
    assert [number(v) for v in (None, True, 1234, 1234.0, 0.123456, "x")] == [
        "not evaluated", "yes", "1,234", "1,234", "0.1235", "x",
    ]  # fmt: skip
    assert proportion(None) == proportion(share(0, 0)) == "not evaluated"
    assert proportion({"value": 0.5, "count": 4}) == "0.500 (n = 4)"
    assert size(1500) == "1.5 kB" and size(2_500_000) == "2.5 MB"


def test_the_tables_of_modifiers_and_strategies_take_the_reports_as_they_are(
    scripted_engine: Callable[..., Any],
    student: Path,
    f16_gguf: Path,
    adapter: Path,
    pairs: list[Pair],
    tmp_path: Path,
) -> None:
    from cogumi_dagster.lib.modifiers.evaluate import evaluate_modifier
    from cogumi_dagster.lib.modifiers.package import package_modifier
    from cogumi_dagster.lib.strategy.evaluate import ADAPTER, evaluate_strategy
    from cogumi_dagster.lib.strategy.journal import keep_journal
    from cogumi_dagster.lib.strategy.problems import strategy_family
    from cogumi_dagster.lib.strategy.teacher import SolverTeacher

    engine = scripted_engine(lambda adapter, prompt: "YES", (ADAPTER, "code"))
    family = strategy_family("scheduling")
    store = ArtifactStore(tmp_path / "store")
    reports: dict[tuple[str, str], Any] = {
        ("strategy_journal", "scheduling"): keep_journal(
            SolverTeacher(engine, family), family, tmp_path, batches=2, problems=6, seed=0
        ),
        ("strategy_evaluation", "scheduling"): evaluate_strategy(
            engine, family, tmp_path, count=6, strategy="Count.", suite_share=0.02, training_seconds=60,
            machine_usd_per_hour=0.1, prices={"dear": (3.0, 15.0), "free": (0.0, 0.0)}, seed=0,
        ),
        ("modifier_evaluation", "code"): evaluate_modifier(
            engine, "code", tmp_path, count=2, noise_seeds=1, cross_domain_tasks=1, seed=0
        ),
    }  # fmt: skip
    reports["packaged_modifier", "code"] = package_modifier(
        adapter, f16_gguf, student, pairs[:4], pairs, tmp_path / "package", families={}, prune_shares=(0.5,),
        prune_keeps=-9.0, level=3, dictionary_kb=4,
    )  # fmt: skip
    made = []
    for (asset, partition), report in reports.items():
        with store.write(asset, partition) as draft:
            (draft.path / "f").write_text(asset)
            draft.metrics.update(report=report_json(report), checks=[])
        assert draft.ref is not None
        made.append(draft.ref)
    stored = reports_of(made)
    evaluation = dict(stored["strategy_evaluation"]["scheduling"])
    _, stages, _ = strategy_tables(stored)
    rows = [dict(zip(stages.columns, row, strict=True)) for row in stages.rows]
    commonest = {row["stage or suite"]: row["commonest answer"][:4] for row in rows}
    assert commonest["untrained student"] == "0.50" and commonest["published mix, sets of 150"] > "0.75"
    (caption,) = (caption for caption, _ in figures(stored) if caption.startswith("Balanced accuracy"))
    assert caption == "Balanced accuracy on 6 problems; always giving the commonest answer scores 0.5"
    evaluation["suites"] = [{k: v for k, v in suite.items() if k != "majority"} for suite in evaluation["suites"]]
    del evaluation["constant_balanced_accuracy"], evaluation["majority"]
    before: Reports = {"strategy_evaluation": {"scheduling": evaluation}}
    assert {row[2] for row in next(strategy_tables(before)).rows} == {"not evaluated"}
    assert any(caption == "Balanced accuracy on 6 problems" for caption, _ in figures(before))
    write_card(made, Profile(name="x"), tmp_path / "out")
    page = (tmp_path / "out" / HTML).read_text()
    for title in (
        "Strategy journal: scheduling",
        "Strategy: scheduling, costs",
        "Every modifier on every domain",
        "Modifiers, packed",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "7 to 10 meetings, class-balanced" in page and "never: the teacher is cheaper" in page


def test_one_adapter_for_all_is_paired_with_each_family_s_own(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def made(asset: str, partition: str, file: str, rows: list[dict[str, Any]], steps: int = 0) -> ArtifactRef:
        with store.write(asset, partition) as draft:
            write_jsonl(draft.path / file, rows)
            draft.metrics.update(report={"steps": steps})
        assert draft.ref is not None
        return draft.ref

    def answers(passed: dict[str, bool]) -> list[dict[str, Any]]:
        rows = [{"stage": "suites", "task": {"id": task}, "passed": right} for task, right in passed.items()]
        return [*rows, {"stage": "untrained student", "task": {"id": "a"}, "passed": False}]

    refs = [
        made("strategy_evaluation", "chain_sum", "answers.jsonl", answers({"a": True, "b": True, "own": False})),
        made("strategy_evaluation", "all", "answers.jsonl", answers({"a": True, "b": False, "other": True})),
        made("learned_strategy", "chain_sum", "traces.jsonl", [{"family": "chain_sum"}] * 8),
        made("learned_strategy", "all", "traces.jsonl", [{"family": "chain_sum"}] * 2 + [{"family": "scheduling"}] * 2),
        made("strategy_adapter", "chain_sum", "f", [], 70),
        made("strategy_adapter", "all", "f", [], 240),
    ]
    (row,) = one_for_all(refs)
    assert (row.family, row.own_traces, row.one_traces) == ("chain_sum", 8, 2)
    assert (row.own, row.one, row.difference.p_value) == (Proportion(2, 2), Proportion(1, 2), 1.0)
    assert row.difference.difference.value == 0.5 and (row.own_steps, row.one_steps) == (70, 240)
    (table,) = one_for_all_table([row])
    assert dict(zip(table.columns, table.rows[0], strict=True))["steps of the one"] == "240"
    (before,) = one_for_all(refs[:4])
    assert before.one_steps is None
    assert one_for_all(refs[:1]) == []
