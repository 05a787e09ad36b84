"""A loopback server that speaks OpenAI's and Anthropic's wire formats, scripted by each test."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Reply = tuple[int, dict[str, str], bytes]
CANARY = "Zq9.canary.0123456789.never.store.me"  # looks like no provider's key, so no pattern can catch it


def chat_reply(text: str = "The answer is 4.", finish: str = "stop", cached: int = 0) -> Reply:
    body = {
        "id": "c1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }  # fmt: skip
    return 200, {}, json.dumps(body).encode()


def anthropic_reply(text: str = "The answer is 4.", stop: str = "end_turn", cached: int = 0) -> Reply:
    body = {
        "id": "m1", "type": "message", "role": "assistant", "model": "m", "stop_reason": stop, "stop_sequence": None,
        "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": text}],
        "usage": {"input_tokens": 15, "output_tokens": 10, "cache_read_input_tokens": cached},
    }  # fmt: skip
    return 200, {}, json.dumps(body).encode()


def error_reply(status: int, message: str, headers: dict[str, str] | None = None) -> Reply:
    return status, headers or {}, json.dumps({"error": {"message": message, "type": "x", "code": "x"}}).encode()


class TeacherServer:
    """``script`` is used up first; then ``default`` answers. ``seen`` holds (path, headers, body) of each request."""

    def __init__(self) -> None:
        self.script: list[Reply] = []
        self.default: Callable[[str, dict[str, Any]], Reply] = lambda path, body: (
            anthropic_reply() if path.endswith("/messages") else chat_reply()
        )
        self.models = ["m"]
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None: ...

            def do_GET(self) -> None:
                with server.lock:
                    server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, {}))
                data = [{"id": m, "object": "model", "type": "model", "created": 1, "owned_by": "x",
                         "display_name": m, "created_at": "2026-01-01T00:00:00Z"} for m in server.models]  # fmt: skip
                body = {"object": "list", "data": data, "has_more": False, "first_id": None, "last_id": None}
                self._send((200, {}, json.dumps(body).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    reply = server.script.pop(0) if server.script else None
                self._send(reply or server.default(self.path, body))

            def _send(self, reply: Reply) -> None:
                status, headers, data = reply
                if status == 0:  # hang up without a word
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def posts(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.seen if body]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherServer]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CANARY_KEY", CANARY)
    server = TeacherServer()
    yield server
    server.close()


@pytest.fixture
def replies() -> dict[str, Any]:
    """The reply makers and the canary, for tests that cannot import this file."""
    return {"chat": chat_reply, "anthropic": anthropic_reply, "error": error_reply, "canary": CANARY}
