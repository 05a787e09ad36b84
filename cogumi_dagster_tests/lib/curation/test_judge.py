import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.curation.judge import (
    SCORES_SCHEMA,
    QualityReport,
    ScoredRow,
    echoes,
    parse_scores,
    repetition,
    score_by_rules,
    score_responses,
)
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching import asking
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import Journal
from cogumi_dagster.lib.teaching.providers import Answer
from cogumi_dagster.lib.teaching.teach import ResponseRow, VerdictRow

GOOD = "There are 3 baskets with 4 apples each. 3 times 4 is 12, so the farmer has 12 apples."
PROMPT = "A farmer has 3 baskets with 4 apples each. How many apples does the farmer have in all?"
SCORES = {"accuracy": 3, "completeness": 2, "coherence": 2, "helpfulness": 1.5}


def row(
    response: str = GOOD,
    passed: bool | None = True,
    finish: str = "stop",
    prompt: str = PROMPT,
    teacher: str = "a",
    score: float = 0.0,
) -> ResponseRow:
    return ResponseRow(
        task=Task("math", "apples", "easy", prompt, answer="12").to_json(),
        teacher=teacher, tier=1, response=response,
        verdict=VerdictRow(passed=passed, reason="", score=score), finish_reason=finish,
        prompt_tokens=1, completion_tokens=1, usd=0.0, stand_in=True,
    )  # fmt: skip


def test_a_good_verified_answer_gets_ten_and_says_who_judged() -> None:
    quality = score_by_rules(row())
    assert quality["total"] == 10.0 and quality["judge"] == "rules" and quality["stand_in"]
    assert quality["notes"] == []


@pytest.mark.parametrize(
    ("bad", "part", "most", "note"),
    [
        (row("", None), "accuracy", 0.0, "empty"),
        (row(passed=False), "accuracy", 0.0, "wrong"),
        (row(passed=False, score=0.9), "accuracy", 1.0, "wrong"),
        (row(passed=None), "accuracy", 2.0, "accuracy not verified"),
        (row(finish="length"), "completeness", 0.0, "truncated"),
        (row("Twelve apples.", None), "completeness", 1.0, "very short"),
        (row("The farmer counts all the apples in each of the", None), "completeness", 1.0, "ends in mid-sentence"),
        (row("no, no.\n" * 20, None), "coherence", 0.0, "repeats lines"),
        (row(GOOD + "\n```python\nx = 1", None), "coherence", 1.0, "code block left open"),
        (row(GOOD + " \ufffd\ufffd", None), "coherence", 1.0, "unreadable characters"),
        (row(PROMPT, None), "helpfulness", 1.0, "echoes the instruction"),
        (row("I'm sorry, I cannot count the apples of a farmer for you.", None), "helpfulness", 0.0, "refusal"),
        (row("Paris was founded by a Celtic tribe on an island.", None), "helpfulness", 1.0, "does not speak of what"),
        (row("12"), "helpfulness", 2.0, "bare answer"),
    ],
)
def test_each_rule_costs_points_and_says_why(bad: ResponseRow, part: str, most: float, note: str) -> None:
    quality = score_by_rules(bad)
    assert quality[part] == most  # type: ignore[literal-required]
    assert any(found.startswith(note) for found in quality["notes"])
    assert quality["total"] == sum(quality[p] for p in ("accuracy", "completeness", "coherence", "helpfulness"))  # type: ignore[literal-required]


def test_wrong_answers_fall_below_the_threshold_and_right_or_unverified_good_ones_do_not() -> None:
    assert score_by_rules(row(passed=False))["total"] < 7.0
    assert score_by_rules(row("12"))["total"] >= 7.0
    assert score_by_rules(row(passed=None))["total"] >= 7.0
    assert score_by_rules(row(finish="length", passed=False))["total"] < 7.0


def test_repetition_is_seen_in_ngrams_and_spares_ordinary_text() -> None:
    assert repetition("the cat sat on the mat " * 12)
    assert "dominates" in repetition(" ".join(f"ha ha word{i}" for i in range(60)))
    assert repetition(GOOD) == "" and repetition("") == ""
    essay = (
        "Plants make sugar from light, water and carbon dioxide. Chlorophyll in the leaves catches red and blue light,"
        " which is why leaves look green. The energy splits water, oxygen leaves through small pores, and hydrogen is"
        " carried on to a second stage, where an enzyme joins carbon dioxide to a sugar with five carbon atoms. Cool"
        " nights slow that enzyme down; drought closes the pores and starves it. Farmers who know both can choose when"
        " to water, and how much shade a seedling needs in its first weeks."
    )
    assert len(essay.split()) > 50
    assert repetition(essay) == ""


def test_a_verified_grid_loses_one_point_only() -> None:
    grid = "The grid of apples is:\n" + "0 0 0 0 0 0\n" * 12
    assert score_by_rules(row(grid))["coherence"] == 1.0
    assert score_by_rules(row(grid, None))["coherence"] == 0.0
    assert score_by_rules(row(f"The grid of apples is:\n```\n{grid}```\nDone."))["coherence"] == 2.0


def test_echo_needs_half_of_the_words_copied() -> None:
    assert echoes(PROMPT, PROMPT) and echoes("Answer: " + PROMPT, PROMPT)
    assert not echoes(GOOD, PROMPT) and not echoes(PROMPT + " " + GOOD * 3, PROMPT)


@pytest.mark.parametrize(
    "text",
    [
        "", "no json", "{", "[1]", json.dumps(SCORES | {"accuracy": 4}), json.dumps(SCORES | {"accuracy": True}),
        json.dumps(SCORES | {"accuracy": "3"}), json.dumps({"accuracy": 3}), '{"accuracy": NaN}',
        "{" * 5000 + "}" * 5000,
        json.dumps(SCORES).replace("3", "NaN", 1),
    ],
)  # fmt: skip
def test_scores_that_are_not_the_rubrics_are_not_read(text: str) -> None:
    assert parse_scores(text) is None


def test_scores_are_read_out_of_prose_and_fences() -> None:
    assert parse_scores(f"Here:\n```json\n{json.dumps(SCORES | {'reason': 'ok'})}\n```") == SCORES


class FakeJudge:
    def __init__(self, reply: Callable[[dict[str, str], int], str]) -> None:
        self.reply = reply
        self.asked: list[dict[str, str]] = []
        self.schemas: list[Mapping[str, Any] | None] = []

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None,
        seed: int,
        response_schema: Mapping[str, Any] | None = None,
    ) -> Answer:
        data = json.loads(messages[-1]["content"])
        self.asked.append(data)
        self.schemas.append(response_schema)
        return Answer(self.reply(data, seed), "stop", 100, 20)

    def models(self) -> set[str]:
        return {"m"}


JUDGE = Teacher(
    name="gpt", provider="openai", model="m", tier=3, api_key_env="K", usd_per_million_input=1.0,
    usd_per_million_output=1.0, requests_per_minute=100_000,
)  # fmt: skip
SOLVER = Teacher(name="solver", provider="solver", model="exact", tier=3)


def by_model(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    judge: FakeJudge,
    rows: list[ResponseRow],
    cap: float = 1.0,
    labels: Path | None = None,
) -> tuple[list[ScoredRow], QualityReport]:
    monkeypatch.setattr(asking, "connect", lambda teacher: judge)
    catalogue = Catalogue(path="t", teachers={"gpt": JUDGE, "solver": SOLVER})
    with Journal(tmp_path / "j.db") as journal:
        return score_responses(rows, "gpt", catalogue=catalogue, journal=journal, cap_usd=cap, agreement_set=labels)


def test_a_model_judges_through_the_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judge = FakeJudge(lambda data, seed: json.dumps(SCORES))
    scored, report = by_model(monkeypatch, tmp_path, judge, [row(), row(passed=False, prompt="another?")])
    assert [r["quality"]["total"] for r in scored] == [8.5, 8.5]
    assert scored[0]["quality"]["judge"] == "gpt" and not report.stand_in
    assert report.parse_rate == 1.0 and report.usd == pytest.approx(240e-6)
    assert {data["program_found"] for data in judge.asked} == {"right", "wrong: "}
    assert judge.schemas == [SCORES_SCHEMA] * 2
    _, again = by_model(monkeypatch, tmp_path, judge, [row(), row(passed=False, prompt="another?")])
    assert len(judge.asked) == 2 and again.usd == 0.0


def test_what_does_not_parse_is_asked_once_more_then_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reply(data: dict[str, str], seed: int) -> str:
        never, second = data["answer"] == "never", data["answer"] == "second time"
        return "hm" if never or (second and seed == 0) else json.dumps(SCORES)

    rows = [row(), row("second time"), row("never")]
    scored, report = by_model(monkeypatch, tmp_path, FakeJudge(reply), rows)
    assert [r["response"] for r in scored] == [GOOD, "second time"], "never a zero for what could not be scored"
    assert report.unscored == {"unreadable": 1} and report.parse_rate == pytest.approx(2 / 5)


def test_a_judge_over_budget_says_what_is_left_and_a_rerun_pays_only_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    judge = FakeJudge(lambda d, s: json.dumps(SCORES))
    rows = [row(f"answer {i}") for i in range(6)]
    with pytest.raises(CogumiError, match=r"used up.*left to do: [1-5] of the judge's 6 answers"):
        by_model(monkeypatch, tmp_path, judge, rows, cap=0.002)
    paid = len(judge.asked)
    assert 0 < paid < 6
    scored, _ = by_model(monkeypatch, tmp_path, judge, rows)
    assert len(scored) == 6 and len(judge.asked) == 6, "no score is paid twice"


def test_the_report_counts_by_teacher_and_score() -> None:
    scored, report = score_responses([row(), row("12", teacher="b"), row(passed=False, teacher="b")])
    totals = [r["quality"]["total"] for r in scored]
    assert totals == [10.0, 9.0, 5.0]
    assert report.mean == pytest.approx(8.0) and report.spread == pytest.approx(2.1602, abs=1e-4)
    assert report.histogram == (0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1)
    assert {name: (of.rows, of.mean, of.spread) for name, of in report.by_teacher.items()} == {
        "a": (1, 10.0, 0.0),
        "b": (2, 7.0, 2.0),
    }
    assert report.by_teacher["b"].histogram == (0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0)
    assert (report.by_teacher["b"].enough.successes, report.by_teacher["b"].enough.count) == (1, 2)
    assert report.by_domain["math"].histogram == report.histogram
    assert report.notes == {"bare answer": 1, "wrong": 1} and report.stand_in and report.judge == "rules"
    json.dumps(report_json(report))


def test_judges_that_cannot_judge_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="needs a catalogue"):
        score_responses([row()], "gpt")
    catalogue = Catalogue(path="t", teachers={"gpt": JUDGE, "solver": SOLVER})
    with Journal(tmp_path / "j.db") as journal:
        for name, said in (("solver", "cannot judge"), ("gtp", "did you mean 'gpt'")):
            with pytest.raises(CogumiError, match=said):
                score_responses([row()], name, catalogue=catalogue, journal=journal)
