"""A loopback server that speaks OpenAI's and Anthropic's wire formats, and misbehaves as told.

It runs in a thread of its own, in asyncio, so that thousands of calls at once cost it little. It counts, by prompt, the
requests whose work it did: those are what a provider would bill, whether or not the answer arrives.
"""

import asyncio
import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

CANARY = "Zq9.canary.0123456789.never.store.me"  # looks like no provider's key, so no pattern can catch it
PROMPT_TOKENS, COMPLETION_TOKENS = 20, 10


@dataclass(frozen=True)
class Reply:
    """An answer on the wire. Status 0 is a connection reset without a word."""

    status: int
    headers: dict[str, str]
    body: bytes
    delay: float = 0.0
    """Seconds before the first byte."""
    cut: int | None = None
    """So many bytes of the body are sent, then the connection is closed."""
    drip: float = 0.0
    """Seconds between the bytes of the body."""
    billed: bool | None = None
    """Whether the work was done; by default where the status is 200."""


def chat_reply(text: str = "The answer is 4.", finish: str = "stop", cached: int = 0) -> Reply:
    body = {
        "id": "c1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS, "total_tokens": 30,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }  # fmt: skip
    return Reply(200, {}, json.dumps(body).encode())


def anthropic_reply(text: str = "The answer is 4.", stop: str = "end_turn", cached: int = 0) -> Reply:
    body = {
        "id": "m1", "type": "message", "role": "assistant", "model": "m", "stop_reason": stop, "stop_sequence": None,
        "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": text}],
        "usage": {"input_tokens": 15, "output_tokens": COMPLETION_TOKENS, "cache_read_input_tokens": cached},
    }  # fmt: skip
    return Reply(200, {}, json.dumps(body).encode())


def error_reply(status: int, message: str, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, headers or {}, json.dumps({"error": {"message": message, "type": "x", "code": "x"}}).encode())


def answer_to(prompt: str) -> str:
    """What ``wired`` answers: of its own to every prompt."""
    return "The answer is " + hashlib.sha256(prompt.encode()).hexdigest()[:24]


def wired(path: str, prompt: str) -> Reply:
    return anthropic_reply(answer_to(prompt)) if path.endswith("/messages") else chat_reply(answer_to(prompt))


def spoiled(good: Reply, kind: str, retry_after: str = "1") -> Reply:
    """``good`` as it arrives when something goes wrong."""
    if kind == "429 with Retry-After":
        return error_reply(429, "slow down", {"Retry-After": retry_after})
    if kind == "429":
        return error_reply(429, "slow down")
    if kind == "500":
        return error_reply(500, "oops")
    if kind == "reset before the work":
        return Reply(0, {}, b"", billed=False)
    if kind == "reset after the work":
        return Reply(0, {}, b"", billed=True)
    if kind == "truncated body":
        return replace(good, cut=len(good.body) // 2)
    if kind == "malformed JSON":
        return replace(good, body=good.body[: len(good.body) // 2])
    if kind == "slow body":
        return replace(good, drip=0.002)
    raise ValueError(kind)


FAULTS = (
    "429 with Retry-After", "429", "500", "reset before the work", "reset after the work", "truncated body",
    "malformed JSON", "slow body",
)  # fmt: skip


class WireServer:
    """``script`` is used up first; then ``default`` answers. ``seen`` holds (path, headers, body) of each request.

    ``billed`` counts, by the user's prompt, the requests whose work was done; ``faults`` the replies that were spoiled.
    """

    def __init__(self, latency: float = 0.0, port: int = 0) -> None:
        self.latency = latency
        self.script: list[Reply] = []
        self.default: Callable[[str, dict[str, Any]], Reply] = lambda path, body: (
            anthropic_reply() if path.endswith("/messages") else chat_reply()
        )
        self.models = ["m"]
        self.listing: Reply | None = None
        """Answers the question for the models, where it is not the list."""
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.keep = True
        """Whether ``seen`` is kept; off for thousands of calls."""
        self.billed: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.open = self.most_open = self.work = self.arrived = 0
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(port,), daemon=True)
        self._thread.start()
        self._started.wait(10)
        self.url = f"http://127.0.0.1:{self.port}"

    def misbehave(self, share: float, retry_after: str = "1") -> None:
        """Answer every prompt in its own way, and spoil a share of the replies, by prompt and how often it came."""

        def reply(path: str, body: dict[str, Any]) -> Reply:
            prompt = user_prompt(body)
            good = wired(path, prompt)
            dice = hashlib.sha256(f"{self.asked[prompt]} {prompt}".encode()).digest()
            if int.from_bytes(dice[:4], "big") / 2**32 >= share:
                return good
            kind = FAULTS[dice[4] % len(FAULTS)]
            self.faults[kind] += 1
            return spoiled(good, kind, retry_after)

        self.default = reply

    def posts(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.seen if body]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self, port: int) -> None:
        self._loop.run_until_complete(self._serve(port))
        self._loop.close()

    async def _serve(self, port: int) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, backlog=512)
        self.port = int(server.sockets[0].getsockname()[1])
        self._started.set()
        await self._stop.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the caller has gone
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(data) if data else {}
        if self.keep:
            self.seen.append((path, headers, body))
        if method == "GET":
            return await self._send(writer, self.listing or self._listed())
        self.open += 1
        self.arrived += 1
        self.most_open = max(self.most_open, self.open)
        try:
            reply = self.script.pop(0) if self.script else self.default(path, body)
            await asyncio.sleep(self.latency + reply.delay)
            prompt = user_prompt(body)
            self.asked[prompt] += 1
            worked = reply.status == 200 if reply.billed is None else reply.billed
            self.billed[prompt] += worked
            self.work += worked
            return await self._send(writer, reply)
        finally:
            self.open -= 1

    def _listed(self) -> Reply:
        data = [
            {"id": m, "object": "model", "type": "model", "created": 1, "owned_by": "x", "display_name": m,
             "created_at": "2026-01-01T00:00:00Z"}
            for m in self.models
        ]  # fmt: skip
        body = {"object": "list", "data": data, "has_more": False, "first_id": None, "last_id": None}
        return Reply(200, {}, json.dumps(body).encode())

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        if reply.status == 0:
            linger = struct.pack("ii", 1, 0)  # close with RST, not FIN
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return False
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body)), **reply.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {reply.status} X\r\n{lines}\r\n".encode())
        if reply.drip:
            for byte in reply.body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(reply.drip)
        else:
            writer.write(reply.body[: reply.cut])
        await writer.drain()
        return reply.cut is None


def user_prompt(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return str(body["messages"][-1]["content"])
