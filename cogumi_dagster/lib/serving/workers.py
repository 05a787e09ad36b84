"""Threads that answer: as many as the engine has slots, and a bounded line before them."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

from cogumi_dagster.lib.serving.answering import Piece

logger = logging.getLogger(__name__)

MakePieces = Callable[[], Generator[Piece, None, None]]


class LineFullError(Exception):
    """All slots are taken and the line before them is full."""


class Job:
    """One answer: made in a worker thread, read as an async iterator on the event loop."""

    def __init__(self, make: MakePieces) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self.task: asyncio.Task[None] | None = None
        self.started = False

    def cancel(self) -> None:
        """Leave the line, or stop at the next token; the reader's iteration ends. To be called on the event loop."""
        self._cancelled.set()
        if self.task is not None and not self.started:
            self.task.cancel()
        self._pieces.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces. Raises what the assistant raised. Ends early, without a last piece, when cancelled."""
        while (item := await self._pieces.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def run(self) -> None:
        """The work, in its thread. Closing the generator is what frees the engine's slot."""
        try:
            with closing(self._make()) as pieces:
                for piece in pieces:
                    if self._cancelled.is_set():
                        logger.info("the client left: the answer is given up")
                        return
                    self._post(piece)
        except Exception as error:
            self._post(error)
        finally:
            self._post(None)

    def _post(self, item: Piece | Exception | None) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)


class Workers:
    """At most ``slots`` answers at a time and ``queue`` in line. A slot is free again when its thread is done."""

    def __init__(self, slots: int, queue: int) -> None:
        self._room = slots + queue
        self._slots = asyncio.Semaphore(slots)
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="answer")
        self._jobs: set[Job] = set()

    @property
    def running(self) -> int:
        return sum(job.started for job in self._jobs)

    @property
    def waiting(self) -> int:
        return len(self._jobs) - self.running

    def submit(self, make: MakePieces) -> Job:
        """Start an answer, or put it in line. Raises LineFullError."""
        if len(self._jobs) >= self._room:
            raise LineFullError
        job = Job(make)
        self._jobs.add(job)
        job.task = asyncio.create_task(self._drive(job))
        job.task.add_done_callback(lambda _: self._jobs.discard(job))
        return job

    async def close(self) -> None:
        """Cancel every answer and wait for the threads, so that the engine may be closed after."""
        for job in list(self._jobs):
            job.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    async def _drive(self, job: Job) -> None:
        async with self._slots:
            job.started = True
            await asyncio.get_running_loop().run_in_executor(self._threads, job.run)
