"""Asking: one teacher, many questions, through the journal and under a cap. Teaching, judge and cascade all ask here.

The SDKs' own retries are off, so retries live here: jittered exponential backoff that honours Retry-After, each
attempt with an intent row of its own.
"""

import json
import logging
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Engine, Message
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.teaching.catalogue import MICROS, Catalogue, Teacher, prompt_tokens_about
from cogumi_dagster.lib.teaching.journal import Call, Journal, OnDoubt, Ticket, call_key
from cogumi_dagster.lib.teaching.providers import Answer, ApiTeacher, TeacherError, ask_local, connect

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 120.0
"""A provider that asks to wait longer (a daily quota) counts as down for this run."""
RETRY_AFTER_JITTER = 0.1
EXHAUSTED_CALLS = 3
"""After this many calls that failed all their attempts, a teacher counts as down."""
BUSY_SECONDS = 600.0
"""How long to wait for another process that has sent the same call."""
TOO_LONG = "prompt too long for the engine's context"
OVER_BUDGET = ("over budget", "over the month's budget")
LOCAL_BATCH = 32
"""Local answers committed at once: what a kill can cost in repeated (free) work."""


@dataclass(frozen=True)
class Request:
    """One thing to ask: the whole conversation (with the system prompt), and whose it is."""

    messages: tuple[Message, ...]
    task: str
    domain: str


@dataclass(frozen=True)
class Outcome:
    """What came of a request. ``answer`` is None with a ``failure``; ``cached`` when the journal had the answer."""

    answer: Answer | None = None
    micros: int = 0
    cached: bool = False
    failure: str = ""


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``index`` tells the samples of one question apart, and is the seed."""

    max_tokens: int
    temperature: float | None
    index: int
    schema: Mapping[str, Any] | None = None


class Pacer:
    """Spaces units (calls, or tokens) evenly, so that a minute never holds more than the teacher's limit."""

    def __init__(self, per_minute: int) -> None:
        self._gap = 60.0 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, units: int = 1) -> None:
        with self._lock:
            now = monotonic()
            at = max(now, self._next)
            self._next = at + units * self._gap
        if at > now:
            sleep(at - now)

    def give_back(self, units: int) -> None:
        """Of what ``wait`` reserved, what was not used."""
        with self._lock:
            self._next -= units * self._gap


class Asker:
    """Asks teachers through the journal: replays what is known, reserves, sends, retries, commits."""

    def __init__(
        self,
        catalogue: Catalogue,
        journal: Journal,
        engine: Callable[[], Engine] | None,
        *,
        cap_usd: float,
        on_doubt: OnDoubt,
        concurrency: int,
        engine_version: str = "",
    ) -> None:
        self.catalogue = catalogue
        self.journal = journal
        self.down: dict[str, str] = {}
        """Teachers that cannot be asked any more, and why."""
        self._engine = engine
        self.cap_usd = cap_usd
        self._cap_micros = round(cap_usd * MICROS)
        self._on_doubt = on_doubt
        self._concurrency = concurrency
        self._engine_version = engine_version
        self._clients: dict[str, ApiTeacher] = {}
        self._pacers: dict[str, Pacer] = {}
        self._token_pacers: dict[str, Pacer] = {}
        self._exhausted: Counter[str] = Counter()
        self._jitter = random.Random(0)
        self.new_calls = 0
        """Requests sent, retries included."""
        self.new_micros = 0
        """What they cost, with the worst case of those that may have been billed without an answer."""
        self._lock = threading.Lock()
        self._room = threading.Condition()
        self._open = self._closed = 0
        self._refused: dict[str, int] = {}

    def why_not(self, name: str) -> str:
        """Why a teacher cannot be asked now; empty when it can. Goes over no network."""
        teacher = self.catalogue.get(name)
        if name not in self.down and teacher.provider == "local" and self._engine is None:
            self.down[name] = "no local engine"
        if name not in self.down and teacher.paid and name not in self._clients:
            if not teacher.priced:
                self.down[name] = "its price is unknown"
                return self.down[name]
            try:
                self._clients[name] = connect(teacher)
                self._pacers[name] = Pacer(teacher.requests_per_minute)
                if teacher.tokens_per_minute:
                    self._token_pacers[name] = Pacer(teacher.tokens_per_minute)
            except TeacherError as error:
                log.warning("%s", error.problem)
                self.down[name] = error.kind
        return self.down.get(name, "")

    def ask_many(
        self,
        name: str,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float | None = None,
        sample: int = 0,
        response_schema: Mapping[str, Any] | None = None,
        progress: Progress = silent,
    ) -> list[Outcome]:
        """Answers in the order of ``requests``; a failure is an outcome, never an exception.

        ``temperature`` replaces the catalogue's, unless the model takes none. Equal requests are asked once.
        """
        teacher = self.catalogue.get(name)
        if teacher.paid and not teacher.priced:
            return [Outcome(failure=self.why_not(name))] * len(requests)
        heat = teacher.temperature if temperature is None or teacher.temperature is None else temperature
        how = Sampling(max_tokens, heat, sample, response_schema if teacher.paid else None)
        work = [self._call(teacher, request, how) for request in requests]
        outcomes = {key: _settled(ticket) for key, ticket in self.journal.replay([call.key for call in work]).items()}
        known = len(outcomes)
        fresh = {call.key: (call, r) for call, r in zip(work, requests, strict=True) if call.key not in outcomes}
        if fresh and (why := self.why_not(name)):
            outcomes |= dict.fromkeys(fresh, Outcome(failure=why))
        elif fresh:
            run = self._run_api if teacher.paid else self._run_local
            outcomes |= run(
                teacher,
                list(fresh.values()),
                how,
                lambda done, total, note: progress(known + done, known + total, note),
            )
        return [outcomes[call.key] for call in work]

    def unanswered(self, name: str, requests: Sequence[Request], *, max_tokens: int) -> int:
        """How many of these distinct requests the journal has no answer to. Sends nothing."""
        teacher = self.catalogue.get(name)
        how = Sampling(max_tokens, teacher.temperature, 0)
        keys = {self._call(teacher, request, how).key for request in requests}
        return len(keys) - len(self.journal.replay(list(keys)))

    def _call(self, teacher: Teacher, request: Request, how: Sampling) -> Call:
        messages = request.messages
        if how.schema:  # part of what is asked and billed, so part of the key and of the worst case
            messages = (*messages, Message(role="system", content=json.dumps(how.schema, sort_keys=True)))
        key = call_key(
            teacher,
            messages,
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            sample=how.index,
            engine_version=self._engine_version,
        )
        worst = teacher.worst_case_micros(messages, how.max_tokens)
        return Call(key, teacher.name, teacher.model, request.domain, request.task, worst)

    def _begin(self, calls: Sequence[Call]) -> list[Ticket]:
        """Tickets, none of them busy: what another process is asking right now is waited for."""
        patience = monotonic() + BUSY_SECONDS
        tickets = self.journal.begin(calls, cap_micros=self._cap_micros, on_doubt=self._on_doubt)
        while busy := [i for i, ticket in enumerate(tickets) if ticket.status == "busy"]:
            if monotonic() > patience:
                return [Ticket("in doubt") if ticket.status == "busy" else ticket for ticket in tickets]
            sleep(0.2)
            again = self.journal.begin([calls[i] for i in busy], cap_micros=self._cap_micros, on_doubt=self._on_doubt)
            for i, ticket in zip(busy, again, strict=True):
                tickets[i] = ticket
        return tickets

    def _run_local(
        self, teacher: Teacher, work: list[tuple[Call, Request]], how: Sampling, progress: Progress
    ) -> dict[str, Outcome]:
        done: dict[str, Outcome] = {}
        for start in range(0, len(work), LOCAL_BATCH):
            batch = work[start : start + LOCAL_BATCH]
            tickets = self._begin([call for call, _ in batch])
            sent = []
            for (call, request), ticket in zip(batch, tickets, strict=True):
                if ticket.status == "started":
                    sent.append((call, request, ticket.row))
                else:
                    done[call.key] = _settled(ticket)
            done |= self._send_local(teacher, sent, how)
            progress(len(done), len(work), teacher.name)
        return done

    def _send_local(self, teacher: Teacher, sent: list[tuple[Call, Request, int]], how: Sampling) -> dict[str, Outcome]:
        if not sent or self._engine is None:
            return {}
        rows = [row for _, _, row in sent]
        started = monotonic()
        try:
            conversations = [request.messages for _, request, _ in sent]
            answers = ask_local(
                self._engine(), conversations, max_tokens=how.max_tokens, temperature=how.temperature, seed=how.index
            )
        except BaseException as error:
            self.journal.fail(rows, f"{type(error).__name__}: {error}")
            if not isinstance(error, CogumiError):
                raise
            log.warning("teacher %r failed: %s", teacher.name, error.problem)
            self.down[teacher.name] = "engine failed"
            return {call.key: Outcome(failure="engine failed") for call, _, _ in sent}
        if too_long := [row for row, answer in zip(rows, answers, strict=True) if answer is None]:
            self.journal.fail(too_long, TOO_LONG)
        done = [(row, a) for row, a in zip(rows, answers, strict=True) if a is not None]
        costs = {row: teacher.cost_micros(a.prompt_tokens, a.completion_tokens) for row, a in done}
        each = (monotonic() - started) / len(rows)
        self.journal.finish([(row, a, costs[row], each) for row, a in done])
        self._count(len(done), sum(costs.values()))
        return {
            call.key: Outcome(a, costs[row]) if a is not None else Outcome(failure=TOO_LONG)
            for (call, _, row), a in zip(sent, answers, strict=True)
        }

    def _run_api(
        self, teacher: Teacher, work: list[tuple[Call, Request]], how: Sampling, progress: Progress
    ) -> dict[str, Outcome]:
        def one(call: Call, request: Request) -> Outcome:
            return self._send_api(teacher, call, request, how)

        done: dict[str, Outcome] = {}
        pool = ThreadPoolExecutor(max_workers=min(self._concurrency, teacher.concurrency))
        try:
            futures = {call.key: pool.submit(one, call, request) for call, request in work}
            for key, future in futures.items():
                done[key] = future.result()
                progress(len(done), len(work), teacher.name)
        finally:  # an interrupt leaves the queue unsent
            pool.shutdown(cancel_futures=True)
        return done

    def _send_api(self, teacher: Teacher, call: Call, request: Request, how: Sampling) -> Outcome:
        failure = ""
        for attempt in range(ATTEMPTS):
            if why := self.down.get(teacher.name) or self._refusal(call):
                return Outcome(failure=why)
            self._pace(teacher, request, how)
            ticket = self._reserve(call)
            if ticket.status != "started":
                return _settled(ticket)
            try:
                outcome = self._send(teacher, call, ticket.row, request, how)
            except TeacherError as error:
                failure = error.kind
                if not self._again(teacher, error, attempt):
                    break
            else:
                return outcome
        return Outcome(failure=failure)

    def _send(self, teacher: Teacher, call: Call, row: int, request: Request, how: Sampling) -> Outcome:
        """One attempt, committed whatever comes of it. Raises TeacherError."""
        started = monotonic()
        try:
            answer = self._clients[teacher.name].ask(
                request.messages,
                max_tokens=how.max_tokens,
                temperature=how.temperature,
                seed=how.index,
                **({"response_schema": how.schema} if how.schema else {}),
            )
            micros = teacher.cost_micros(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)
            self.journal.finish([(row, answer, micros, monotonic() - started)])
        except TeacherError as error:
            self.journal.fail([row], error.problem, maybe_billed=error.maybe_billed)
            self._count(1, call.worst_micros if error.maybe_billed else 0)
            raise
        except BaseException as error:
            self.journal.fail([row], type(error).__name__, maybe_billed=True)
            raise
        finally:
            with self._room:
                self._open -= 1
                self._closed += 1
                self._room.notify_all()
        self._count(1, micros)
        if teacher.name in self._token_pacers:
            used = answer.prompt_tokens + answer.completion_tokens
            self._token_pacers[teacher.name].give_back(_tokens_about(teacher, request, how) - used)
        return Outcome(answer, micros)

    def _pace(self, teacher: Teacher, request: Request, how: Sampling) -> None:
        self._pacers[teacher.name].wait()
        if teacher.name in self._token_pacers:
            self._token_pacers[teacher.name].wait(_tokens_about(teacher, request, how))

    def _reserve(self, call: Call) -> Ticket:
        """A ticket; over budget only once no call is open, here or elsewhere, whose rest could make room for it."""
        patience = monotonic() + BUSY_SECONDS
        while True:
            with self._room:
                self._open += 1
                closed = self._closed
            started = False
            try:
                ticket = self._begin([call])[0]
                started = ticket.status == "started"
            finally:
                if not started:
                    with self._room:
                        self._open -= 1
                        self._room.notify_all()
            if started or ticket.status not in OVER_BUDGET:
                return ticket
            with self._room:
                while self._open and self._closed == closed:
                    self._room.wait()
                unchanged = self._closed == closed
            if not unchanged:
                continue
            if self.journal.open_elsewhere() and monotonic() < patience:
                sleep(0.2)
                continue
            with self._room:
                least = min(call.worst_micros, self._refused.get(ticket.status, sys.maxsize))
                self._refused[ticket.status] = least
            return ticket

    def _refusal(self, call: Call) -> str:
        """Why a call needs no try: a cheaper one was over budget. Keeps the rest from waiting for their turn."""
        return next((why for why, micros in self._refused.items() if call.worst_micros >= micros), "")

    def over_budget(self, left: int, what: str) -> CogumiError:
        """The error that ends a run over budget: so many of ``what`` are left to do."""
        run, month = self.journal.spent_micros() / MICROS, self.journal.month_micros() / MICROS
        spent = f"${run:.4f} of max_usd_per_run ${self.cap_usd:.2f}"
        mend = "raise teaching.max_usd_per_run, or run again: each run has its own, and no answer is paid twice"
        if self.journal.month_cap_usd is not None:
            spent += f", ${month:.4f} of max_usd_per_month ${self.journal.month_cap_usd:.2f}"
        about = f", about ${left * self.new_micros / self.new_calls / MICROS:.4f} more" if self.new_calls else ""
        if "over the month's budget" in self._refused:
            mend = "raise teaching.max_usd_per_month, or run again next month: no answer is paid twice"
        return CogumiError(f"the teachers' budget is used up ({spent}); left to do: {left:,} of {what}{about}", mend)

    def _count(self, calls: int, micros: int) -> None:
        with self._lock:
            self.new_calls += calls
            self.new_micros += micros

    def _again(self, teacher: Teacher, error: TeacherError, attempt: int) -> bool:
        """Whether to try again, after having waited."""
        log.warning("%s", error.problem)
        if error.teacher_down:
            self.down[teacher.name] = error.kind
        if not error.retryable or (error.maybe_billed and self._on_doubt != "retry"):
            return False
        with self._lock:
            chance = self._jitter.random()
            # Callers that were all told to wait as long must not all come back at once.
            asked = (error.retry_after or 0.0) * (1 + RETRY_AFTER_JITTER * chance)
            wait = max(FIRST_WAIT_SECONDS * 2**attempt * (0.5 + chance), asked)
            self._exhausted[teacher.name] += attempt + 1 == ATTEMPTS
            if wait > LONGEST_WAIT_SECONDS or self._exhausted[teacher.name] >= EXHAUSTED_CALLS:
                self.down[teacher.name] = error.kind
        if attempt + 1 == ATTEMPTS or teacher.name in self.down:
            return False
        sleep(wait)
        return True


def _tokens_about(teacher: Teacher, request: Request, how: Sampling) -> int:
    """What a call may count against a limit per minute: providers count the room for the answer too."""
    return prompt_tokens_about(request.messages) + how.max_tokens + teacher.reasoning_tokens


def _settled(ticket: Ticket) -> Outcome:
    if ticket.answer is None:
        return Outcome(failure=ticket.status)
    return Outcome(ticket.answer, ticket.micros, cached=True)
