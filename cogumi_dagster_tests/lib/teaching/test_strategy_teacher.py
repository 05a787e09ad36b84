"""A provider's model as the teacher of a strategy, over the wire."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from wire_server import WireServer, chat_reply, error_reply, user_prompt

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.strategy.evaluate import ADAPTER, ask_teacher, evaluate_strategy
from cogumi_dagster.lib.strategy.journal import keep_journal
from cogumi_dagster.lib.strategy.problems import strategy_family
from cogumi_dagster.lib.strategy.teacher import CatalogueTeacher, SolverTeacher
from cogumi_dagster.lib.strategy.traces import learn_strategy
from cogumi_dagster.lib.teaching.asking import Asker
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import Journal

FAMILY = strategy_family("scheduling")


STEPS = "I counted the meetings of each hour, one after the other:"


def teacher_of(asker: Asker) -> CatalogueTeacher:
    return CatalogueTeacher(asker, asker.catalogue.get("gpt"), 300)


@pytest.fixture
def asker(server: WireServer, tmp_path: Path) -> Iterator[Asker]:
    gpt = Teacher(
        name="gpt", provider="openai", model="m", tier=2, api_key_env="CANARY_KEY", base_url=f"{server.url}/v1",
        usd_per_million_input=1.0, usd_per_million_output=2.0, requests_per_minute=100_000,
    )  # fmt: skip
    with Journal(tmp_path / "calls.db") as journal:
        yield Asker(
            Catalogue(path="t.yaml", teachers={"gpt": gpt}), journal, None, cap_usd=1.0, on_doubt="retry", concurrency=4
        )


@cache
def solved() -> dict[str, str]:
    """The right answers to all that these tests ask."""
    drawn = [FAMILY.problems(12, 101 * batch, "train") for batch in range(6)]
    return {task.prompt: str(task.answer) for tasks in (*drawn, FAMILY.lessons(24, 0)) for task in tasks}


def pupil(path: str, body: dict[str, Any]) -> Any:
    """Says YES to all until it has a strategy, then is right; wrong on purpose about problems of four rooms."""
    prompt = user_prompt(body)
    if prompt.startswith("You are keeping a journal"):
        return chat_reply("I said YES without counting.")
    if prompt.startswith("This is a kind of problem"):
        return chat_reply("1. Count the meetings of each hour.")
    strategy, _, question = prompt.rpartition("\n\n")
    counted = strategy and "Rooms: 4" not in question
    return chat_reply(f"{STEPS} {solved()[question]}" if counted else "YES")


def test_it_attempts_reflects_and_distils_until_that_no_longer_helps(
    asker: Asker, server: WireServer, tmp_path: Path
) -> None:
    server.default = pupil
    report = keep_journal(teacher_of(asker), FAMILY, tmp_path, batches=6, problems=12, seed=0)
    first, second, third = report.entries[:3]
    assert (first.strategy, first.balanced_accuracy.value, first.wrong) == (0, 0.5, {"YES": 6})
    assert (second.strategy, third.strategy) == (1, 1) and second.balanced_accuracy.value > 0.7
    assert len(report.entries) < 6, "nothing new was said, and the strategy was tried twice"
    assert first.note == "I said YES without counting."
    assert (report.teacher, report.stand_in, report.best_strategy) == ("gpt", False, 1)
    kept = json.loads((tmp_path / "strategies.json").read_text())
    assert [row["text"] for row in kept["strategies"]] == ["", "1. Count the meetings of each hour."]
    assert [(one.version, one.text) for one in report.versions] == [
        (row["version"], row["text"]) for row in kept["strategies"]
    ]
    assert report.versions[0].batches == 1 and report.usd > 0

    calls = len(server.posts())
    again = keep_journal(teacher_of(asker), FAMILY, tmp_path, batches=6, problems=12, seed=0)
    assert again.entries == report.entries and len(server.posts()) == calls, "no call is paid twice"

    learned = learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=24, teacher=teacher_of(asker), seed=0)
    rows = read_jsonl(tmp_path / "out" / "traces.jsonl")
    assert learned.traces == len(rows) < 24 and learned.traces + learned.rejected == 24
    assert all(row["solution"] == f"{STEPS} {row['answer']}" for row in rows), "no bare answer is a trace"
    assert learned.strategy == "1. Count the meetings of each hour." and not learned.stand_in
    assert learned.usd > report.usd, "the journal's cost and that of the traces"

    learned_calls = len(server.posts())
    asker.down["gpt"] = "no key"
    assert learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=24, teacher=teacher_of(asker), seed=0) == learned
    assert len(server.posts()) == learned_calls, "what the journal of calls knows needs no key"


def test_the_teacher_stands_beside_the_student_without_and_with_its_strategy(
    asker: Asker, server: WireServer, scripted_engine: Callable[..., Any], tmp_path: Path
) -> None:
    tasks = FAMILY.problems(12, 13, "test")
    right = {task.prompt: str(task.answer) for task in tasks}

    def told(path: str, body: dict[str, Any]) -> Any:
        strategy, _, question = user_prompt(body).rpartition("\n\n")
        return chat_reply(right[question] if strategy == "Count." else "YES")

    server.default = told
    engine = scripted_engine(lambda adapter, prompt: right[prompt] if adapter else "NO", (ADAPTER,))
    taught = ask_teacher(teacher_of(asker), FAMILY, "Count.", count=12, seed=0)
    report = evaluate_strategy(engine, FAMILY, tmp_path, count=12, strategy="Count.", taught=taught, seed=0)
    assert {row.stage: row.balanced_accuracy.value for row in report.stages} == {
        "untrained student": 0.5, "student, strategy in the prompt": 0.5, "student with adapter": 1.0,
        "teacher (gpt)": 0.5, "teacher, strategy in the prompt": 1.0,
    }  # fmt: skip
    assert len(server.posts()) == 24
    assert [(one.teacher, one.usd_per_answer > 0) for one in report.economics.teachers] == [
        ("teacher (gpt)", True), ("teacher, strategy in the prompt", True),
    ]  # fmt: skip
    unpaid = SolverTeacher(engine, FAMILY, name="local")
    assert ask_teacher(unpaid, FAMILY, "", count=12, seed=0).usd == {}, "its time is not billed"


def test_nonsense_is_no_strategy_and_no_trace(asker: Asker, server: WireServer, tmp_path: Path) -> None:
    server.default = lambda path, body: chat_reply("bla " * 2000)
    report = keep_journal(teacher_of(asker), FAMILY, tmp_path, batches=9, problems=6, seed=0)
    assert report.strategies == 1 and report.best_balanced_accuracy.value == 0.0
    assert report.unusable == {"too long": 3} and len(report.entries) == 3, "not nothing new, but no more is paid for"
    calls = len(server.posts())
    with pytest.raises(CogumiError, match="there is no strategy for scheduling in the journal of gpt"):
        learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=600, teacher=teacher_of(asker), seed=2)
    assert len(server.posts()) == calls, "no trace was paid for"
    (tmp_path / "strategies.json").write_text(json.dumps({"best": 0, "taught": 0, "strategies": [{"text": "Count."}]}))
    with pytest.raises(CogumiError, match="accepts 0 of 50 traces of gpt"):
        learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=600, teacher=teacher_of(asker), seed=2)
    assert len(server.posts()) == calls + 50, "the others were not paid for"
    with pytest.raises(CogumiError, match="accepts 0 of 50 traces of gpt"):  # of open answers none is common
        learn_strategy(
            tmp_path, strategy_family("gcd"), tmp_path / "out", traces=200, teacher=teacher_of(asker), seed=2
        )
    with pytest.raises(CogumiError, match="accepts 0 of 6 traces of gpt"):
        learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=6, teacher=teacher_of(asker), seed=0)
    server.default = lambda path, body: chat_reply("bla " * 20 + "YES")
    with pytest.raises(CogumiError, match="no more than always giving the commonest answer would bring"):
        learn_strategy(tmp_path, FAMILY, tmp_path / "out", traces=24, teacher=teacher_of(asker), seed=1)
    assert not (tmp_path / "out").exists()


def test_no_key_and_no_budget_are_said(asker: Asker, server: WireServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.default = pupil
    asker._cap_micros = 1
    with pytest.raises(CogumiError, match=r"budget is used up .*left to do: 6 of the strategy's problems"):
        teacher_of(asker).attempt(FAMILY.problems(6, 0, "train"), "")
    monkeypatch.delenv("CANARY_KEY")
    asker._clients.clear()
    with pytest.raises(CogumiError, match="teacher gpt cannot be asked") as caught:
        teacher_of(asker).attempt(FAMILY.problems(6, 0, "train"), "")
    assert "CANARY_KEY" in caught.value.mend


def test_a_teacher_that_fails_for_now_is_not_taken_for_a_wrong_one(
    asker: Asker, server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogumi_dagster.lib.teaching.asking.FIRST_WAIT_SECONDS", 0.001)
    server.default = lambda path, body: error_reply(503, "try later")
    with pytest.raises(CogumiError, match="gpt gave no answer to 6 of 6 prompts") as caught:
        teacher_of(asker).attempt(FAMILY.problems(6, 0, "train"), "")
    assert caught.value.retryable


def test_a_teacher_that_refuses_all_is_named_before_its_journal_is_kept(
    asker: Asker, server: WireServer, tmp_path: Path
) -> None:
    server.default = lambda path, body: error_reply(400, "this account may not ask")
    with pytest.raises(CogumiError, match="gpt answered none of 6 problems"):
        keep_journal(teacher_of(asker), FAMILY, tmp_path, batches=3, problems=6, seed=0)
    assert not (tmp_path / "strategies.json").exists()


def test_it_is_shown_hard_mistakes_of_all_kinds_and_has_room_to_write(asker: Asker, server: WireServer) -> None:
    server.default = lambda path, body: chat_reply("Hm.")
    teacher, family = CatalogueTeacher(asker, asker.catalogue.get("gpt"), 50), strategy_family("all")
    answers = teacher.attempt(family.problems(48, 0, "train"), "")
    teacher.reflect(answers)
    asked = server.posts()
    shown = user_prompt(asked[-1])
    assert "Meetings: " in shown and "Courses 0 to" in shown and "Gates: " in shown and "Calculate " in shown
    rooms = [body.get("max_completion_tokens", body.get("max_tokens")) for body in asked]
    assert set(rooms[:-1]) == {448} and rooms[-1] == 512


def test_a_strategy_for_several_families_has_room_for_each(asker: Asker, server: WireServer) -> None:
    teacher, family = teacher_of(asker), strategy_family("all")
    examples = [part.problems(4, 0, "train")[0] for part in family.parts]
    long = "Count. " * 1000  # 7,000 characters
    server.default = lambda path, body: chat_reply(long)
    assert teacher.distil(["Hm."], [""], 0, 0.5, examples).text == long.strip()
    asked = server.posts()[-1]
    assert "at most 800 words" in user_prompt(asked)
    assert asked.get("max_completion_tokens", asked.get("max_tokens")) == 2048
    assert teacher.distil(["Hm."], [""], 0, 0.5, examples[:1]).unusable == "too long"
    assert "at most 200 words" in user_prompt(server.posts()[-1])


@pytest.mark.parametrize(("finish", "why"), [("length", "cut off"), ("content_filter", "refused")])
def test_a_reply_that_is_no_strategy_does_not_end_the_study(
    asker: Asker, server: WireServer, tmp_path: Path, finish: str, why: str
) -> None:
    def reply(path: str, body: dict[str, Any]) -> Any:
        prompt = user_prompt(body)
        if prompt.startswith("This is a kind of problem") and "3. " not in prompt:
            return chat_reply("1. Count", finish)
        return pupil(path, body)

    server.default = reply
    report = keep_journal(teacher_of(asker), FAMILY, tmp_path, batches=5, problems=12, seed=0)
    assert report.unusable == {why: 2}
    assert [entry.strategy for entry in report.entries][:4] == [0, 0, 0, 1]
