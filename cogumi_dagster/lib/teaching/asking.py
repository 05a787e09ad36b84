"""Asking: one teacher, many questions, through the journal and under a cap. Teaching, judge and cascade all ask here.

The SDKs' own retries are off, so retries live here: jittered exponential backoff that honours Retry-After, each
attempt with an intent row of its own.
"""

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic, sleep

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Engine, Message
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.teaching.catalogue import MICROS, Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import Call, Journal, OnDoubt, Ticket, call_key
from cogumi_dagster.lib.teaching.providers import Answer, ApiTeacher, TeacherError, ask_local, connect

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 120.0
"""A provider that asks to wait longer (a daily quota) counts as down for this run."""
EXHAUSTED_CALLS = 3
"""After this many calls that failed all their attempts, a teacher counts as down."""
BUSY_SECONDS = 600.0
"""How long to wait for another process that has sent the same call."""
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


class Pacer:
    """Spaces calls evenly, so that a minute never holds more than the teacher's limit."""

    def __init__(self, per_minute: int) -> None:
        self._gap = 60.0 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        if at > now:
            sleep(at - now)


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
        self._cap_micros = round(cap_usd * MICROS)
        self._on_doubt = on_doubt
        self._concurrency = concurrency
        self._engine_version = engine_version
        self._clients: dict[str, ApiTeacher] = {}
        self._pacers: dict[str, Pacer] = {}
        self._exhausted: Counter[str] = Counter()
        self._jitter = random.Random(0)
        self.new_calls = 0
        """Requests sent, retries included."""
        self.new_micros = 0
        """What they cost, with the worst case of those that may have been billed without an answer."""
        self._lock = threading.Lock()

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
        progress: Progress = silent,
    ) -> list[Outcome]:
        """Answers in the order of ``requests``; a failure is an outcome, never an exception.

        ``temperature`` replaces the catalogue's, unless the model takes none. Equal requests are asked once.
        """
        teacher = self.catalogue.get(name)
        if why := self.why_not(name):
            return [Outcome(failure=why)] * len(requests)
        heat = teacher.temperature if temperature is None or teacher.temperature is None else temperature
        how = Sampling(max_tokens, heat, sample)
        work = [self._call(teacher, request, how) for request in requests]
        distinct = {call.key: (call, request) for call, request in zip(work, requests, strict=True)}
        run = self._run_api if teacher.paid else self._run_local
        outcomes = run(teacher, list(distinct.values()), how, progress)
        return [outcomes[call.key] for call in work]

    def _call(self, teacher: Teacher, request: Request, how: Sampling) -> Call:
        key = call_key(
            teacher,
            request.messages,
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            sample=how.index,
            engine_version=self._engine_version,
        )
        worst = teacher.worst_case_micros(request.messages, how.max_tokens)
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
        costs = [teacher.cost_micros(a.prompt_tokens, a.completion_tokens) for a in answers]
        self.journal.finish(list(zip(rows, answers, costs, strict=True)))
        self._count(len(rows), sum(costs))
        return {call.key: Outcome(a, cost) for (call, _, _), a, cost in zip(sent, answers, costs, strict=True)}

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
            if known := self.journal.replay(call.key):
                return _settled(known)
            if why := self.down.get(teacher.name):
                return Outcome(failure=why)
            self._pacers[teacher.name].wait()
            ticket = self._begin([call])[0]
            if ticket.status != "started":
                return _settled(ticket)
            try:
                answer = self._clients[teacher.name].ask(
                    request.messages, max_tokens=how.max_tokens, temperature=how.temperature, seed=how.index
                )
            except TeacherError as error:
                self.journal.fail([ticket.row], error.problem, maybe_billed=error.maybe_billed)
                self._count(1, call.worst_micros if error.maybe_billed else 0)
                failure = error.kind
                if not self._again(teacher, error, attempt):
                    return Outcome(failure=failure)
                continue
            except BaseException as error:
                self.journal.fail([ticket.row], type(error).__name__, maybe_billed=True)
                raise
            micros = teacher.cost_micros(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)
            self.journal.finish([(ticket.row, answer, micros)])
            self._count(1, micros)
            return Outcome(answer, micros)
        return Outcome(failure=failure)

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
        backoff = FIRST_WAIT_SECONDS * 2**attempt * (0.5 + self._jitter.random())
        wait = max(backoff, error.retry_after or 0.0)
        with self._lock:
            self._exhausted[teacher.name] += attempt + 1 == ATTEMPTS
            if wait > LONGEST_WAIT_SECONDS or self._exhausted[teacher.name] >= EXHAUSTED_CALLS:
                self.down[teacher.name] = error.kind
        if attempt + 1 == ATTEMPTS or teacher.name in self.down:
            return False
        sleep(wait)
        return True


def _settled(ticket: Ticket) -> Outcome:
    if ticket.answer is None:
        return Outcome(failure=ticket.status)
    return Outcome(ticket.answer, ticket.micros, cached=True)
