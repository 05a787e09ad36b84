"""An OpenAI-compatible server over the assistant: strict, bounded, authenticated, cancellable."""

import asyncio
import errno
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.profile import ServingConfig
from cogumi_dagster.lib.serving.access import Door, find_token
from cogumi_dagster.lib.serving.answering import Assistant, Routed
from cogumi_dagster.lib.serving.protocol import (
    SHOWN,
    ChatRequest,
    CompletionRequest,
    Reply,
    RequestError,
    error_body,
    event,
    parse_request,
)
from cogumi_dagster.lib.serving.workers import Job, LineFullError, Workers

logger = logging.getLogger(__name__)

PUBLIC_PATHS = ("/health",)
RETRY_AFTER_SECONDS = 2
"""256 tokens at the 110 tokens/s of SmolLM2-135M on two cores: about when a slot is free again."""
BODY_SECONDS = 30.0
"""How long a client may take to send a body that is at most ``max_body_bytes``."""
SHUTDOWN_SECONDS = 5


def build_app(assistant: Assistant, token: str | None, config: ServingConfig, models: Sequence[str]) -> ASGIApp:
    """The ASGI app. ``models`` are the names that may be asked for; ``token`` None leaves the door open (tests).

    Every body, the errors' too, has OpenAI's shape. A request is validated before it takes a place in line.
    """
    service = _Service(assistant, config, tuple(models))
    middleware = [] if token is None else [Middleware(Door, token=token, public=PUBLIC_PATHS)]
    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/v1/models", service.list_models, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers={RequestError: _refuse, HTTPException: _refuse_http, Exception: _apologize},
        lifespan=service.lifespan,
    )


class _Service:
    """The routes."""

    def __init__(self, assistant: Assistant, config: ServingConfig, models: tuple[str, ...]) -> None:
        self._assistant = assistant
        self._config = config
        self._models = models
        self._workers = Workers(config.slots, config.queue)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self._workers.close()

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok", "running": self._workers.running, "waiting": self._workers.waiting})

    async def list_models(self, request: Request) -> Response:
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "cogumi"} for name in self._models]
        return _json({"object": "list", "data": rows})

    async def chat(self, request: Request) -> "Response | _EventStream":
        return await self._generate(request, parse_request(ChatRequest, await self._body(request)), chat=True)

    async def complete(self, request: Request) -> "Response | _EventStream":
        return await self._generate(request, parse_request(CompletionRequest, await self._body(request)), chat=False)

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is too large, whether its length is declared or not."""
        limit = self._config.max_body_bytes
        too_large = RequestError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError(408, f"the body took longer than {BODY_SECONDS:.0f} seconds") from None
        except ClientDisconnect:
            raise RequestError(400, "the body ended early") from None
        return bytes(body)

    async def _generate(
        self, request: Request, asked: ChatRequest | CompletionRequest, *, chat: bool
    ) -> "Response | _EventStream":
        if asked.model not in self._models:
            name = asked.model[:SHOWN]
            hint = nearest(name, self._models)
            raise RequestError(404, f"there is no model {name!r}: {hint}", param="model", code="model_not_found")
        prompt, params = asked.prompt_of(), asked.params(self._config.context, self._assistant.answer_tokens)
        try:
            job = self._workers.submit(lambda: self._assistant.stream(prompt, asked.model, params))
        except LineFullError:
            retry = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            raise RequestError(429, "the server is busy: the line is full", code="busy", headers=retry) from None
        reply = Reply(asked.model, chat)
        if asked.stream:
            return await _open_stream(request, job, reply, asked.include_usage)
        return await _whole(request, job, reply)


async def _whole(request: Request, job: Job, reply: Reply) -> Response:
    """The answer in one body. A client that leaves meanwhile ends the work."""
    watch = asyncio.create_task(_cancel_when_gone(request.receive, job))
    try:
        async for piece in job:
            if piece.routed is not None:
                return _json(reply.whole(piece.routed), headers=_route_headers(piece.routed))
    except Exception as error:
        raise _as_request_error(error) from error
    finally:
        watch.cancel()
        job.cancel()
    raise _unfinished()


async def _open_stream(request: Request, job: Job, reply: Reply, include_usage: bool) -> "_EventStream":
    """Wait for the first token, so that what fails before it gets an honest status code, then stream."""
    watch = asyncio.create_task(_cancel_when_gone(request.receive, job))
    try:
        pieces = aiter(job)
        first = await anext(pieces)
    except BaseException as error:
        watch.cancel()
        job.cancel()
        if isinstance(error, StopAsyncIteration):
            raise _unfinished() from None
        if isinstance(error, Exception):
            raise _as_request_error(error) from error
        raise

    async def events() -> AsyncIterator[bytes]:
        if opening := reply.opening(include_usage):
            yield event(opening)
        piece = first
        try:
            while piece.routed is None:
                if piece.text:
                    yield event(reply.delta(piece.text, include_usage))
                piece = await anext(pieces)
        except StopAsyncIteration:
            yield event(_unfinished().body())
            return
        except Exception as error:
            yield event(_as_request_error(error).body())
            return
        if piece.text:
            yield event(reply.delta(piece.text, include_usage))
        yield event(reply.finish(piece.routed, include_usage))
        if include_usage:
            yield event(reply.usage(piece.routed))
        yield event("[DONE]")

    return _EventStream(events(), job, watch)


@dataclass
class _EventStream:
    """A response of server-sent events. Ends its job, however it ends itself.

    An error event takes the place of the finish reason and of ``[DONE]``: a cut answer never looks whole.
    """

    events: AsyncIterator[bytes]
    job: Job
    watch: asyncio.Task[None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for data in self.events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.watch.cancel()
            self.job.cancel()


async def _cancel_when_gone(receive: Receive, job: Job) -> None:
    """Nothing but the end of the connection can follow a body that was read whole."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _route_headers(routed: Routed) -> dict[str, str]:
    headers = {"X-Cogumi-Route": routed.route}
    if routed.confidence is not None:
        headers["X-Cogumi-Confidence"] = f"{routed.confidence:.4f}"
    return headers


def _as_request_error(error: Exception) -> RequestError:
    """What a client may read of a failure: an error of ours as it is, any other only that it happened."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CogumiError):
        message = f"{error.problem}: {error.mend}" if error.mend else error.problem
        if error.retryable:
            return RequestError(503, message, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        return RequestError(400, message)
    logger.error("the engine failed", exc_info=error)
    return RequestError(500, "the engine failed; the server's log says why", code="engine_failed")


def _unfinished() -> RequestError:
    return RequestError(503, "the answer was not finished: the server stops or the client left", code="cancelled")


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON that any text survives: half a surrogate pair, which a model can write, becomes a question mark."""
    data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return Response(data, status, headers, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _json(error.body(), error.status, error.headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:SHOWN]}: {error.detail}"
    return _json(error_body(error.status_code, message), error.status_code, dict(error.headers or {}))


async def _apologize(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed; its log says why"), 500)


def bind(host: str, port: int) -> socket.socket:
    """Take the port and hold it, before anything slow is loaded. Port 0 takes any free one.

    Raises:
        CogumiError: the port is in use or not allowed, the host is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
        held.listen(socket.SOMAXCONN)
    except (OSError, OverflowError) as error:
        held.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            mend = f"stop what listens there, or choose another port, such as {port + 1}"
            raise CogumiError(f"port {port} of {host} is in use", mend) from None
        mend = "choose a port from 1024 to 65535 and an address of this machine"
        raise CogumiError(f"the server cannot listen on port {port} of {host}: {error}", mend) from None
    return held


def serve(
    bundle_path: Path,
    host: str,
    port: int,
    token: str | None,
    *,
    token_file: Path,
    config: ServingConfig,
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Check the port, verify and load the bundle, and serve it until interrupted.

    Raises:
        CogumiError: port, token or bundle; each with its mend.
    """
    import uvicorn

    from cogumi_dagster.lib.serving.bundle import load_assistant, open_bundle

    held = bind(host, port)
    try:
        secret = find_token(token, token_file)
        bundle = open_bundle(bundle_path)
        say(f"bundle {bundle.version[:12]}: {len(bundle.adapters)} modifiers, every file verified; loading ...")
        assistant = load_assistant(bundle, slots=config.slots, context=config.context, threads=threads)
        try:
            app = build_app(assistant, secret.value, config, assistant.models)
            where = f"[{host}]" if ":" in host else host
            say(f"serving   http://{where}:{held.getsockname()[1]}/v1")
            say(f"models    {', '.join(assistant.models)}")
            say(f"token     {secret.origin}")
            options = uvicorn.Config(
                app, log_level="warning", server_header=False, http="h11", ws="none",
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )  # fmt: skip
            with suppress(KeyboardInterrupt):
                uvicorn.Server(options).run(sockets=[held])
        finally:
            assistant.close()
    finally:
        held.close()
