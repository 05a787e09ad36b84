"""A hand-written engine, router and detector, and a real server over them on a loopback port."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import uvicorn

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Chunk, Completion, Message
from cogumi_dagster.lib.profile import ServingConfig
from cogumi_dagster.lib.serving.answering import Assistant
from cogumi_dagster.lib.serving.server import bind, build_app

TOKEN = "a-token-for-tests"
SMALL = ServingConfig(slots=2, queue=2, max_body_bytes=20_000, context=512)


class FakeEngine:
    """Says who answers and to what, a word at a time. ``easy`` in a prompt makes the base sure of itself.

    ``hold`` in a prompt makes it wait for ``release`` after each word, ``die`` makes it fail after two.
    """

    def __init__(self, adapters: tuple[str, ...] = ("code", "reasoning", "automation")) -> None:
        self.adapters = adapters
        self.release = threading.Event()
        self.calls: list[tuple[str | None, str]] = []
        self.conversations: list[Sequence[Message]] = []
        self.samplings: list[dict[str, object]] = []
        self.active = 0
        self.most_active = 0
        self.given_up = 0
        self.closed = False
        self.lock = threading.Lock()

    def stream(
        self,
        messages: Sequence[Message] | str,
        *,
        adapter: str | None = None,
        max_tokens: int = 256,
        **sampling: object,
    ) -> Iterator[Chunk]:
        if isinstance(messages, str):
            return self._words(messages, adapter, max_tokens, sampling)
        self.conversations.append(messages)
        return self._words(messages[-1]["content"], adapter, max_tokens, sampling)

    def close(self) -> None:
        self.closed = True

    def _words(self, prompt: str, adapter: str | None, max_tokens: int, sampling: dict[str, object]) -> Iterator[Chunk]:
        with self.lock:
            self.calls.append((adapter, prompt))
            self.samplings.append({"max_tokens": max_tokens, **sampling})
            self.active += 1
            self.most_active = max(self.active, self.most_active)
        try:
            if "too long" in prompt:
                raise CogumiError("the prompt is longer than the context", "shorten it")
            words = f"{adapter or 'base'} on <{prompt}> ünï 🙂".split(" ")
            finish = "stop" if len(words) <= max_tokens else "length"
            words = [word if n == 0 else f" {word}" for n, word in enumerate(words[:max_tokens])]
            for n, word in enumerate(words):
                if "die" in prompt and n == 2:
                    raise RuntimeError("the engine died with a secret path in its message")
                yield Chunk(word)
                if "hold" in prompt:
                    self.release.wait(0.01)
                    while not self.release.is_set():
                        yield Chunk("")
                        self.release.wait(0.01)
            sure = -0.01 if "easy" in prompt else -3.0
            text = "".join(words)
            yield Chunk("", Completion(text, finish, len(prompt.split()), len(words), (sure,) * len(words)))
        except GeneratorExit:
            self.given_up += 1
            raise
        finally:
            with self.lock:
                self.active -= 1


@dataclass(frozen=True)
class FakeDecision:
    route: str
    confidence: float
    modifier: str | None
    domain: str


@dataclass
class FakeRouter:
    """Sure above 0.5; ``code`` in a prompt is the domain code, ``poem`` one without a modifier."""

    prompts: list[str] = field(default_factory=list)

    def decide(self, prompt: str, logprobs: Sequence[float], completion_tokens: int) -> FakeDecision:
        assert len(logprobs) == completion_tokens
        self.prompts.append(prompt)
        confidence = math.exp(sum(logprobs) / max(1, len(logprobs)))
        domain = "code" if "code" in prompt else "creative" if "poem" in prompt else "reasoning"
        modifier = None if domain == "creative" else domain
        route = "base" if confidence > 0.5 or modifier is None else modifier
        return FakeDecision(route, confidence, modifier, domain)


class FakeEscalation:
    def score(self, text: str) -> float:
        return 0.9 if "wrong" in text else 0.1


@dataclass
class Room:
    """A server under test and what stands behind it."""

    url: str
    token: str
    engine: FakeEngine
    router: FakeRouter

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def assistant(engine: FakeEngine, router: FakeRouter) -> Assistant:
    return Assistant(engine, router, FakeEscalation())  # type: ignore[arg-type]


@contextmanager
def running(assistant: Assistant, engine: FakeEngine, router: FakeRouter, config: ServingConfig) -> Iterator[Room]:
    held = bind("127.0.0.1", 0)
    app = build_app(assistant, TOKEN, config, assistant.models)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11", ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: server.run(sockets=[held]), daemon=True)
    thread.start()
    try:
        yield Room(f"http://127.0.0.1:{held.getsockname()[1]}", TOKEN, engine, router)
    finally:
        engine.release.set()
        server.should_exit = True
        thread.join(10)
        held.close()
        assert not thread.is_alive()


StartRoom = Callable[[ServingConfig], Room]


@pytest.fixture(scope="module")
def standing_room() -> Iterator[Room]:
    engine, router = FakeEngine(), FakeRouter()
    assistant = Assistant(engine, router, FakeEscalation())  # type: ignore[arg-type]
    with running(assistant, engine, router, SMALL) as room:
        yield room


@pytest.fixture
def quiet_room(standing_room: Room) -> Room:
    """A server shared by the tests that leave nothing behind: starting one takes a third of a second."""
    standing_room.engine.calls.clear()
    standing_room.engine.samplings.clear()
    return standing_room


@pytest.fixture
def start_room(assistant: Assistant, engine: FakeEngine, router: FakeRouter) -> Iterator[StartRoom]:
    with ExitStack() as stack:
        yield lambda config: stack.enter_context(running(assistant, engine, router, config))


@pytest.fixture
def room(start_room: StartRoom) -> Room:
    return start_room(SMALL)
