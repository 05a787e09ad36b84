"""``serve``, ``chat``, and the questions that end ``demo``."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cogumi_dagster.commands.terminal import console
from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import Profile, read_profile
from cogumi_dagster.lib.serving.client import ask_questions

BUNDLE = "bundle"
START_SECONDS = 120


def _store() -> ArtifactStore:
    from resources import build_resources

    store: ArtifactStore = build_resources()["store"].open()
    return store


def serve_bundle(bundle: Path | None, host: str, port: int | None, token: str | None) -> None:
    """Serve until interrupted."""
    from cogumi_dagster.lib.serving.server import serve

    profile = read_profile()
    folder = bundle or _store().get("serving_bundle").path / BUNDLE
    serve(
        folder,
        host,
        port or profile.serving.port,
        token,
        token_file=Path(os.environ["COGUMI_HOME"]) / ".cogumi" / "server_token",
        config=profile.serving,
        threads=profile.compute.threads,
    )


def open_chat(url: str, port: int, token: str | None) -> None:
    """The chat page, on a running server or one of its own."""
    from cogumi_dagster.lib.serving.chat import run_chat

    if url:
        if not token:
            raise CogumiError("the server's token is missing", "pass --token, or set COGUMI_TOKEN")
        run_chat(url, token, port)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server does not outlive the page
    with local_server(_store()) as (address, secret):
        run_chat(address, secret, port)


@contextmanager
def local_server(store: ArtifactStore) -> Iterator[tuple[str, str]]:
    """A server of the store's bundle in a process of its own: (base URL, token)."""
    import socket

    import httpx

    bundle = store.get("serving_bundle").path / BUNDLE
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = secrets.token_urlsafe(24)
    command = [sys.executable, "-m", "cogumi_dagster.cli", "serve", str(bundle), "--port", str(port)]
    log = store.root / "server.log"

    with log.open("wb") as output:
        environment = {**os.environ, "COGUMI_TOKEN": secret}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_SECONDS * 5):
            if process.poll() is not None:
                raise CogumiError(f"the server did not start: {log.read_text()[-400:].strip()}", f"see {log}")
            try:
                if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        else:
            raise CogumiError(f"the server did not start in {START_SECONDS} s", f"see {log}")
        yield address, secret
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def ask_the_server(store: ArtifactStore, profile: Profile, questions: Sequence[str]) -> None:
    """Start the server, ask through the official openai client, and show the route of each answer."""
    console.print("\n[bold]Three questions through the server, with the openai client[/]")
    with local_server(store) as (address, secret):
        for row in ask_questions(f"{address}/v1", secret, questions, max_tokens=profile.serving.demo_max_tokens):
            confidence = "-" if row.confidence is None else f"{row.confidence:.2f}"
            console.print(f"\n[bold]> {row.question}[/]", markup=True)
            console.print(row.answer.strip(), markup=False)
            console.print(f"[dim]route {row.route}, confidence {confidence}, {row.seconds:.1f} s[/]")
