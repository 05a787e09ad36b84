import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from wire_server import CANARY, Reply, chat_reply, error_reply

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.inference.base import Completion, Message, PromptTooLong
from cogumi_dagster.lib.tasks.base import Task, Verdict
from cogumi_dagster.lib.teaching import asking, available
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import Call, Journal
from cogumi_dagster.lib.teaching.providers import Answer, TeacherError
from cogumi_dagster.lib.teaching.teach import ResponseRow, TeachingReport, teach


class FakeEngine:
    """Answers by a function of the prompt; counts what it was asked."""

    adapters: tuple[str, ...] = ()

    def __init__(self, answer: Callable[[str], str], finish: str = "stop") -> None:
        self.answer, self.finish = answer, finish
        self.asked: list[str] = []

    def chat_many(self, conversations: Sequence[Sequence[Message]], **how: Any) -> list[Completion]:
        prompts = [conversation[-1]["content"] for conversation in conversations]
        self.asked += prompts
        return [Completion(self.answer(prompt), self.finish, 10, 5) for prompt in prompts]


class FakeApi:
    """A paid teacher that follows a script of errors, then answers."""

    def __init__(self, text: str = "4", errors: Sequence[TeacherError] = (), finish: str = "stop") -> None:
        self.text, self.errors, self.finish = text, list(errors), finish
        self.calls = 0
        self.listed: set[str] = set()

    def ask(self, messages: Sequence[Message], *, max_tokens: int, temperature: float | None, seed: int) -> Answer:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return Answer(self.text, self.finish, 100, 50)

    def models(self) -> set[str]:
        return self.listed


def api(name: str, **changes: object) -> Teacher:
    fields: dict[str, object] = {
        "name": name, "provider": "openai", "model": f"{name}-model", "tier": 2, "api_key_env": "KEY",
        "base_url": f"http://{name}.test/v1",
        "usd_per_million_input": 1.0, "usd_per_million_output": 2.0, "requests_per_minute": 100_000,
    }  # fmt: skip
    return Teacher.model_validate(fields | changes)


FREE = {"usd_per_million_input": 0.0, "usd_per_million_output": 0.0, "stand_in": True}
SOLVER = Teacher(name="solver", provider="solver", model="exact", tier=3, **FREE)  # type: ignore[arg-type]
LOCAL = Teacher(name="local", provider="local", model="student", tier=1, **FREE)  # type: ignore[arg-type]


def catalogue(*teachers: Teacher) -> Catalogue:
    return Catalogue(path="teachers.yaml", teachers={t.name: t for t in (SOLVER, LOCAL, *teachers)})


def tasks(count: int, solution: bool = True) -> list[Task]:
    return [
        Task(
            "math",
            "sum",
            "easy",
            f"What is {i} + {i}?",
            answer=str(2 * i),
            solution=f"It is {2 * i}" if solution else None,
        )
        for i in range(count)
    ]


def verify(task: Task, response: str) -> Verdict:
    right = response.split()[-1:] == [task.answer]
    return Verdict(right, "" if right else "wrong number", float(right))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.db") as opened:
        yield opened


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(asking, "sleep", waited.append)
    return waited


@pytest.fixture
def apis(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> dict[str, FakeApi]:
    """Paid teachers by name; those not in it have no key."""
    fakes: dict[str, FakeApi] = {}

    def connect(teacher: Teacher) -> FakeApi:
        if teacher.name not in fakes:
            raise TeacherError(f"{teacher.name} has no key", "export KEY=...", kind="no key", teacher_down=True)
        fakes[teacher.name].listed = fakes[teacher.name].listed or {teacher.model}
        return fakes[teacher.name]

    monkeypatch.setattr(asking, "connect", connect)
    monkeypatch.setattr(available, "connect", connect)
    return fakes


def run(
    journal: Journal,
    shares: dict[str, float],
    *teachers: Teacher,
    work: list[Task] | None = None,
    engine: FakeEngine | None = None,
    check: Callable[[Task, str], Verdict] = verify,
    **how: Any,
) -> tuple[list[ResponseRow], TeachingReport]:
    how = {"max_tokens": 64, "cap_usd": 1.0, "concurrency": 4} | how
    factory = None if engine is None else lambda: engine
    return teach(work or tasks(40), "math", shares, catalogue(*teachers), journal, factory, check, **how)  # type: ignore[arg-type]


def test_shares_are_kept_and_the_assignment_never_changes(journal: Journal) -> None:
    engine = FakeEngine(lambda prompt: str(2 * int(prompt.split()[2])))
    rows, report = run(journal, {"local": 0.3, "solver": 0.7}, work=tasks(600), engine=engine)
    assert report.rows == 600 and report.unanswered == 0
    assert 0.24 < report.by_teacher["local"] / 600 < 0.36
    again, _ = run(journal, {"local": 0.3, "solver": 0.7}, work=tasks(600)[::-1], engine=engine)
    assert {r["task"]["id"]: r["teacher"] for r in again} == {r["task"]["id"]: r["teacher"] for r in rows}
    assert [r["task"]["prompt"] for r in rows[:3]] == [t.prompt for t in tasks(3)], "rows keep the tasks' order"


def test_rejected_local_answers_go_to_the_solver(journal: Journal) -> None:
    engine = FakeEngine(lambda prompt: str(2 * int(prompt.split()[2])) if int(prompt.split()[2]) % 2 else "99")
    rows, report = run(journal, {"local": 1.0, "solver": 0.0}, engine=engine)
    assert report.rows == 20 and report.unanswered == 20, "a solver with no share is not in the mix"
    rows, report = run(journal, {"local": 0.995, "solver": 0.005}, engine=engine)
    assert report.rows == 40 and report.verified_share == 1.0
    assert report.reassigned["local -> solver: rejected by the verifier"] >= 18
    assert all(r["stand_in"] and r["usd"] == 0.0 for r in rows)
    assert report.stand_ins == ("local", "solver")


def test_local_answers_without_a_verifier_are_kept_unless_cut_off(journal: Journal) -> None:
    unknown = Verdict(None, "no verifier")
    rows, report = run(journal, {"local": 1.0}, engine=FakeEngine(lambda p: "ok"), check=lambda t, r: unknown)
    assert len(rows) == 40 and report.verified_share is None and report.checked == 0
    cut = FakeEngine(lambda p: "and then", finish="length")
    rows, report = run(journal, {"local": 1.0}, engine=cut, check=lambda t, r: unknown, max_tokens=65)
    assert rows == [] and report.failures == {"local: truncated": 40}


def test_a_rerun_repeats_no_call(journal: Journal, apis: dict[str, FakeApi]) -> None:
    apis["gpt"] = FakeApi("4")
    engine = FakeEngine(lambda p: str(2 * int(p.split()[2])))
    first, before = run(journal, {"local": 0.5, "gpt": 0.5}, api("gpt"), engine=engine)
    calls, asked = apis["gpt"].calls, len(engine.asked)
    assert calls + asked == 40 == before.new_calls and before.usd == pytest.approx(calls * 200e-6)
    second, after = run(journal, {"local": 0.5, "gpt": 0.5}, api("gpt"), engine=engine)
    assert (apis["gpt"].calls, len(engine.asked)) == (calls, asked)
    assert second == first
    assert (after.new_calls, after.cached_calls, after.usd) == (0, 40, 0.0)
    assert after.usd_of_rows == before.usd_of_rows > 0


def test_other_weights_behind_the_local_teacher_are_asked_anew(journal: Journal) -> None:
    engine = FakeEngine(lambda p: "x")
    run(journal, {"local": 1.0}, engine=engine, engine_version="gguf-1")
    run(journal, {"local": 1.0}, engine=engine, engine_version="gguf-2")
    assert len(engine.asked) == 80


def test_nothing_is_spent_while_a_teacher_of_the_mix_cannot_be_asked(
    journal: Journal, apis: dict[str, FakeApi]
) -> None:
    apis["gpt"], apis["old"], apis["other"] = FakeApi("4"), FakeApi("4"), FakeApi("4")
    apis["old"].listed = {"old-model-2", "whisper"}
    known = api("gpt"), api("old"), api("absent", usd_per_million_input=None), api("other"), api("best", tier=3)
    with pytest.raises(
        CogumiError, match="nothing was spent: teacher 'old' cannot be asked: openai does not list"
    ) as e:
        run(journal, {"gpt": 0.5, "old": 0.25, "solver": 0.25}, *known)
    assert "'old-model-2'" in e.value.mend and "'gpt' or 'other' instead, of the same tier" in e.value.mend
    with pytest.raises(CogumiError, match="'absent' cannot be asked: its price is unknown"):
        run(journal, {"gpt": 0.5, "absent": 0.5}, *known)
    with pytest.raises(CogumiError, match="best has no key"):
        run(journal, {"gpt": 1.0}, *known, later=("best",))
    assert [fake.calls for fake in apis.values()] == [0, 0, 0]


def test_a_teacher_whose_answers_are_all_known_need_not_be_there(journal: Journal, apis: dict[str, FakeApi]) -> None:
    apis["gpt"] = FakeApi("4")
    first, _ = run(journal, {"gpt": 0.5, "solver": 0.5}, api("gpt"))
    apis.clear()
    assert run(journal, {"gpt": 0.5, "solver": 0.5}, api("gpt"))[0] == first
    assert run(journal, {"solver": 1.0}, api("gpt"), later=("gpt",))[1].rows == 40, "and nothing is spent here"


def test_a_failing_teachers_share_goes_to_its_tier_then_to_the_next(journal: Journal, apis: dict[str, FakeApi]) -> None:
    gone = TeacherError("404", kind="model withdrawn", teacher_down=True)
    apis["mid"], apis["cheap"] = FakeApi(errors=[gone]), FakeApi("4")
    apis["peer"], apis["best"] = FakeApi("4"), FakeApi("4")
    known = api("mid"), api("cheap", tier=1), api("peer"), api("best", tier=3)
    _, report = run(journal, {"mid": 0.25, "cheap": 0.25, "best": 0.25, "peer": 0.25}, *known, concurrency=1)
    assert list(report.reassigned) == ["mid -> peer: model withdrawn"]
    assert report.reassigned["mid -> peer: model withdrawn"] == report.failures["mid: model withdrawn"] > 0
    apis["mid"].errors = [gone]
    _, report = run(journal, {"mid": 0.4, "cheap": 0.3, "best": 0.3}, *known, concurrency=1, max_tokens=65)
    assert list(report.reassigned) == ["mid -> best: model withdrawn"]


def test_a_task_without_solution_leaves_the_solver(journal: Journal, apis: dict[str, FakeApi]) -> None:
    apis["gpt"] = FakeApi("4")
    rows, report = run(journal, {"solver": 0.9, "gpt": 0.1}, api("gpt"), work=tasks(10, solution=False))
    assert {r["teacher"] for r in rows} == {"gpt"} and len(rows) == 10
    assert "solver -> gpt: no solution" in report.reassigned


def test_a_withdrawn_model_is_asked_once_and_not_again(journal: Journal, apis: dict[str, FakeApi]) -> None:
    gone = TeacherError("404", kind="model withdrawn", teacher_down=True)
    apis["gpt"] = FakeApi(errors=[gone] * 100)
    _, report = run(journal, {"gpt": 0.9, "solver": 0.1}, api("gpt"), concurrency=1)
    assert apis["gpt"].calls == 1
    assert report.unavailable == {"gpt": "model withdrawn"}
    assert report.by_teacher == {"solver": 40} and report.usd == 0.0


def test_retries_back_off_and_honour_retry_after(
    journal: Journal, apis: dict[str, FakeApi], waits: list[float]
) -> None:
    limits = [TeacherError("429", kind="rate limit", retryable=True, retry_after=wait) for wait in (30.0, None, None)]
    apis["gpt"] = FakeApi("4", errors=limits)
    _, report = run(journal, {"gpt": 1.0}, api("gpt"), work=tasks(1))
    assert report.rows == 1 and report.new_calls == 4
    waits = [wait for wait in waits if wait > 0.1]  # the pacer's are shorter
    assert 30.0 <= waits[0] <= 33.0, "as asked, and not all at once"
    assert 1.0 <= waits[1] <= 3.0 and 2.0 <= waits[2] <= 6.0, "1 s doubled, by half to one and a half"


def test_permanent_errors_are_not_retried(journal: Journal, apis: dict[str, FakeApi], waits: list[float]) -> None:
    apis["gpt"] = FakeApi("4", errors=[TeacherError("400", kind="bad request")])
    _, report = run(journal, {"gpt": 1.0}, api("gpt"), work=tasks(1))
    assert apis["gpt"].calls == 1 and report.failures == {"gpt: bad request": 1} and report.unanswered == 1


def test_a_teacher_that_keeps_failing_counts_as_down(journal: Journal, apis: dict[str, FakeApi]) -> None:
    broken = [TeacherError("500", kind="server error", retryable=True)] * 1000
    apis["gpt"] = FakeApi(errors=broken)
    _, report = run(journal, {"gpt": 0.95, "solver": 0.05}, api("gpt"), concurrency=1)
    assert apis["gpt"].calls == asking.EXHAUSTED_CALLS * asking.ATTEMPTS
    assert report.by_teacher == {"solver": 40}


def test_the_cap_holds_and_what_does_not_fit_goes_to_the_next(journal: Journal, apis: dict[str, FakeApi]) -> None:
    apis["gpt"] = FakeApi("4")
    gpt = api("gpt")
    message = [Message(role="user", content=tasks(1)[0].prompt)]
    cap = 5 * gpt.worst_case_micros(message, 64) / 1e6
    _, report = run(journal, {"gpt": 0.95, "solver": 0.05}, gpt, cap_usd=cap)
    assert report.usd <= cap and apis["gpt"].calls >= 5
    assert report.reassigned["gpt -> solver: over budget"] > 0 and report.unanswered == 0
    zero = run(journal, {"gpt": 0.95, "solver": 0.05}, gpt, cap_usd=0.0, max_tokens=63)[1]
    assert zero.usd == 0.0 and zero.by_teacher == {"solver": 40}


def test_at_the_cap_it_stops_and_says_what_is_left_and_goes_on_later(tmp_path: Path, apis: dict[str, FakeApi]) -> None:
    """An answer costs 0.2 of a thousandth; ten fit. The cap is of the run, whoever opens the journal."""
    apis["gpt"] = FakeApi("4")
    path, gpt = tmp_path / "budget.db", api("gpt")
    for first, run_name in enumerate(("monday", "monday", "tuesday")):
        with Journal(path, run=run_name) as opened, pytest.raises(CogumiError, match="left to do") as stopped:
            run(opened, {"gpt": 1.0}, gpt, cap_usd=0.0023)
        done = 20 if first == 2 else 10
        assert apis["gpt"].calls == done
        assert f"{40 - done} of the domain math's 40 tasks" in stopped.value.problem
        assert "max_usd_per_run" in stopped.value.mend
    with (
        Journal(path, run="wednesday", month_cap_usd=0.0063) as opened,
        pytest.raises(CogumiError, match="10 of the domain math's 40 tasks") as stopped,
    ):
        run(opened, {"gpt": 1.0}, gpt)
    assert apis["gpt"].calls == 30 and "max_usd_per_month" in stopped.value.mend
    with Journal(path, run="thursday") as opened:
        _, report = run(opened, {"gpt": 1.0}, gpt, cap_usd=0.0023)
    assert report.rows == 40 and apis["gpt"].calls == 40, "no answer was paid twice"
    assert report.run_usd <= report.cap_usd


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (FakeApi("0", finish="length"), "truncated"),
        (FakeApi("  "), "empty"),
        (FakeApi("0", finish="content_filter"), "refused"),
    ],
)
def test_truncated_and_empty_answers_are_marked_and_never_rows(
    journal: Journal, apis: dict[str, FakeApi], answer: FakeApi, reason: str
) -> None:
    apis["poor"] = answer
    rows, report = run(journal, {"poor": 1.0}, api("poor"), work=tasks(3))
    assert rows == [] and report.failures == {f"poor: {reason}": 3} and report.unanswered == 3
    rows, report = run(journal, {"poor": 0.98, "solver": 0.02}, api("poor"), work=tasks(3))
    assert {row["teacher"] for row in rows} == {"solver"} and report.cached_calls == 3
    assert report.reassigned == {f"poor -> solver: {reason}": 3}
    assert answer.calls == 3, "a bad answer is known too, and not paid for twice"


def test_a_lost_connection_is_in_doubt_and_counted(journal: Journal, apis: dict[str, FakeApi]) -> None:
    lost = TeacherError("cut", kind="connection lost", retryable=True, maybe_billed=True)
    apis["gpt"] = FakeApi("0", errors=[lost])
    _, report = run(journal, {"gpt": 1.0}, api("gpt"), work=tasks(1), on_doubt="skip")
    assert apis["gpt"].calls == 1 and report.unanswered == 1, "not sent again under skip"
    assert len(report.in_doubt) == 1 and report.usd == pytest.approx(report.in_doubt[0].worst_usd)
    with pytest.raises(CogumiError, match=r"1 call\(s\) may have been billed.*task") as caught:
        run(journal, {"gpt": 1.0}, api("gpt"), work=tasks(1), on_doubt="ask")
    assert "on_doubt" in caught.value.mend
    _, report = run(journal, {"gpt": 1.0}, api("gpt"), work=tasks(1), on_doubt="retry")
    assert report.rows == 1 and apis["gpt"].calls == 2 and report.in_doubt == ()


def test_an_unpriced_teacher_is_refused(journal: Journal, apis: dict[str, FakeApi]) -> None:
    apis["gpt"] = FakeApi("4")
    with pytest.raises(CogumiError, match="price is unknown"):
        run(journal, {"gpt": 0.9, "solver": 0.1}, api("gpt", usd_per_million_output=None))
    assert apis["gpt"].calls == 0


def test_an_engine_that_fails_passes_its_share_on(journal: Journal) -> None:
    class Stopped(FakeEngine):
        def chat_many(self, conversations: Sequence[Sequence[Message]], **how: Any) -> list[Completion]:
            raise CogumiError("the engine has stopped")

    _, report = run(journal, {"local": 0.9, "solver": 0.1}, engine=Stopped(str))
    assert report.unavailable == {"local": "engine failed"} and report.by_teacher == {"solver": 40}
    _, report = run(journal, {"local": 0.9, "solver": 0.1}, engine=None)
    assert report.unavailable == {"local": "no local engine"}


def test_a_prompt_too_long_for_the_engine_costs_no_other_its_answer(journal: Journal) -> None:
    class Narrow(FakeEngine):
        def chat_many(self, conversations: Sequence[Sequence[Message]], **how: Any) -> list[Completion]:
            if any(prompt_of(conversation) == long for conversation in conversations):
                raise PromptTooLong("it exceeds the context")
            return super().chat_many(conversations, **how)

    def prompt_of(conversation: Sequence[Message]) -> str:
        return conversation[-1]["content"]

    drawn = tasks(9)
    long = drawn[4].prompt
    engine = Narrow(lambda prompt: "4")
    _, report = run(journal, {"local": 1.0}, engine=engine, work=drawn)
    assert report.unavailable == {} and len(set(engine.asked)) == 8 and long not in engine.asked


def test_an_interrupt_leaves_the_open_call_in_doubt(journal: Journal, apis: dict[str, FakeApi]) -> None:
    class Interrupted(FakeApi):
        def ask(self, *args: Any, **kwargs: Any) -> Answer:
            raise KeyboardInterrupt

    apis["gpt"] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(journal, {"gpt": 1.0}, api("gpt"), work=tasks(1))
    assert len(journal.in_doubt()) == 1


def test_equal_requests_are_asked_once(journal: Journal, apis: dict[str, FakeApi]) -> None:
    apis["gpt"] = FakeApi("4")
    twins = [Task("math", family, "easy", "What is 2 + 2?", answer="4") for family in ("sum", "addition")]
    rows, _ = run(journal, {"gpt": 1.0}, api("gpt"), work=twins)
    assert len(rows) == 2 and apis["gpt"].calls == 1


def test_shares_that_do_not_sum_to_one_and_unknown_teachers_are_refused(journal: Journal) -> None:
    with pytest.raises(CogumiError, match=r"sum to 0\.5"):
        run(journal, {"solver": 0.5})
    with pytest.raises(CogumiError, match="did you mean 'solver'"):
        run(journal, {"slover": 1.0})


def test_rows_and_report_are_plain_json(journal: Journal) -> None:
    rows, report = run(journal, {"solver": 1.0}, work=tasks(2))
    assert Task.from_json(json.loads(json.dumps(rows))[0]["task"]) == tasks(1)[0]
    assert json.loads(json.dumps(report_json(report)))["by_teacher"] == {"solver": 2}


def test_over_http_a_429_is_waited_out_and_the_key_is_nowhere(
    journal: Journal, server: Any, waits: list[float]
) -> None:
    key = CANARY
    server.script = [
        error_reply(429, f"slow down, {key}", {"Retry-After": "9"}),
        error_reply(500, f"boom {key}"),
        Reply(200, {}, b'{"choices": [{"mess'),
        chat_reply(f"{key} 0"),
    ]
    server.models = ["gpt-model"]
    gpt = api("gpt", api_key_env="CANARY_KEY", base_url=f"{server.url}/v1")
    rows, report = run(journal, {"gpt": 1.0}, gpt, work=tasks(1))
    assert report.new_calls == 4 and rows[0]["response"] == "[redacted] 0"
    assert 9.0 <= max(waits) <= 9.9
    stored = b"".join(path.read_bytes() for path in journal.path.parent.rglob("*") if path.is_file())
    assert b"slow down" in stored and key.encode() not in stored
    with sqlite3.connect(journal.path) as db:
        states = [state for (state,) in db.execute("SELECT state FROM calls ORDER BY id")]
    db.close()
    assert states == ["failed", "failed", "written off", "done"], "the unreadable answer may have been billed"


def test_another_process_asking_the_same_is_waited_for(
    journal: Journal, apis: dict[str, FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    apis["gpt"] = FakeApi("0")
    gpt, work = api("gpt"), tasks(1)
    messages = [Message(role="user", content=work[0].prompt)]
    key = asking.call_key(gpt, messages, max_tokens=64, temperature=None, sample=0)
    with Journal(journal.path) as other:
        row = other.begin([Call(key, "gpt", "m", "math", "x", 9)], cap_micros=99, on_doubt="retry")[0].row

        def answered_meanwhile(seconds: float) -> None:
            if seconds == 0.2:
                other.finish([(row, Answer("0", "stop", 1, 1), 5, 0.5)])

        monkeypatch.setattr(asking, "sleep", answered_meanwhile)
        rows, report = run(journal, {"gpt": 1.0}, gpt, work=work)
    assert apis["gpt"].calls == 0 and rows[0]["usd"] == 5e-6 and report.cached_calls == 1
