"""Who may use the server: the bearer token, where it is kept, and the door that asks for it."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.serving.protocol import error_body

TOKEN_VARIABLE = "COGUMI_TOKEN"
TOKEN_BYTES = 32
"""Of randomness in a generated token."""
TOKEN_SHAPE = re.compile(r"[\x21-\x7e]{8,512}")
"""What fits into a header without quoting, and is not guessed at once."""


@dataclass(frozen=True)
class Token:
    """A token and where it came from, in words that tell the user how to read it. Never printed itself."""

    value: str
    origin: str

    def __repr__(self) -> str:
        return f"Token(origin={self.origin!r})"


def find_token(given: str | None, token_file: Path) -> Token:
    """The token from the argument, else from COGUMI_TOKEN, else from ``token_file``, which is made (0600) if need be.

    Raises:
        CogumiError: a token that cannot be sent in a header, a file that cannot be read or written.
    """
    if given is not None:
        return Token(_checked(given, "the token given"), "the token you gave")
    if from_environment := os.environ.get(TOKEN_VARIABLE):
        return Token(_checked(from_environment, TOKEN_VARIABLE), f"in the environment variable {TOKEN_VARIABLE}")
    return Token(_read_or_make(token_file), f"in a file; read it with: cat {token_file}")


def _checked(token: str, name: str) -> str:
    if not TOKEN_SHAPE.fullmatch(token):
        raise CogumiError(f"{name} cannot be used as a token", "use 8 to 512 visible ASCII characters, no spaces")
    return token


def _read_or_make(path: Path) -> str:
    """The file is created with its mode, not changed after: no moment in which others can read it."""
    try:
        if path.is_file() and (token := path.read_text(encoding="utf-8").strip()):
            path.chmod(0o600)
            return _checked(token, str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        token = secrets.token_urlsafe(TOKEN_BYTES)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
            out.write(token + "\n")
        return token
    except (OSError, UnicodeDecodeError) as error:
        raise CogumiError(f"the token file {path} cannot be used: {error}", f"set {TOKEN_VARIABLE} instead") from None


class Door:
    """ASGI middleware: every path needs the bearer token, but those of ``public``."""

    def __init__(self, app: ASGIApp, token: str, public: Collection[str]) -> None:
        self._app = app
        self._digest = _digest(token)
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_to_all = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in self._public)
        if open_to_all or self._admits(Headers(scope=scope).getlist("authorization")):
            await self._app(scope, receive, send)
            return
        body = error_body(401, "give the server's token: Authorization: Bearer TOKEN", code="invalid_api_key")
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _admits(self, headers: list[str]) -> bool:
        """Digests are compared, in constant time, so that neither length nor content leaks."""
        if len(headers) != 1:
            return False
        scheme, _, token = headers[0].partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(_digest(token), self._digest)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
