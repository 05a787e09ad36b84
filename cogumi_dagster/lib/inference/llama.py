"""The llama.cpp engine: its own server, in this process, with continuous batching and LoRA per request.

Requests with different adapters must not share a prompt cache (llama.cpp#26207: the cache of one
adapter silently contaminates another). So slots are handed out here (``slots.py``), and a request
reads a slot's cache only where the same adapter filled it: a conversation's next turn, or a common
system prompt, is not computed again.
"""

import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.inference.base import Chunk, Completion, Message, PromptTooLong
from cogumi_dagster.lib.inference.kept import KeptAnswers
from cogumi_dagster.lib.inference.slots import Slots
from cogumi_dagster.lib.progress import Progress, silent


class LlamaEngine:
    """One GGUF base and its GGUF adapters, all loaded at start; see ``Engine`` for the methods."""

    def __init__(
        self,
        gguf: Path,
        adapters: Mapping[str, Path] | None = None,
        *,
        slots: int = 4,
        context: int = 1024,
        threads: int | None = None,
        gpu_layers: int | None = None,
        reuse_prompts: bool = True,
        least_answer_tokens: int = 0,
        max_answer_tokens: int | None = None,
        kept: Path | None = None,
    ) -> None:
        """``context`` is in tokens, per slot; ``gpu_layers`` go to a GPU, None: all that fit where there is one;
        ``reuse_prompts``: what a slot has cached of a prompt is not read again; ``least_answer_tokens`` are allowed
        to every answer of ``chat_many``, ``max_answer_tokens`` to none more. What ``chat_many`` answers is written
        to the folder ``kept`` at once, and is not asked again by an engine of the same files that is given it.

        Raises:
            CogumiError: a file is missing or not loadable.
        """
        import xllamacpp

        paths = dict(adapters or {})
        for path in (gguf, *paths.values()):
            if not path.is_file():
                raise CogumiError(f"there is no model file {path}", "materialize it, or check the path")
        self.adapters = tuple(paths)
        self.slots, self.context = slots, context
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_parallel, params.n_ctx = slots, slots * context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or free_cores()
        if gpu_layers is not None:
            params.n_gpu_layers = gpu_layers
        params.cache_prompt, params.cache_ram_mib = False, 0
        params.warmup = False
        params.verbosity = -1
        params.endpoint_slots = params.ui = False
        params.api_keys = [secrets.token_hex(16)]  # its HTTP listener is not ours to open
        params.lora_init_without_apply = True
        loras = []
        for path in paths.values():
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(path), 0.0
            loras.append(lora)
        params.lora_adapters = loras
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:
            raise CogumiError(
                f"llama.cpp could not load {gguf}: {error}", "cogumi verify finds damaged files"
            ) from error
        self._places, self._reuse = Slots(slots), reuse_prompts
        self._least, self._most = least_answer_tokens, max_answer_tokens or context
        self._kept = KeptAnswers(kept, gguf, paths) if kept else None
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="llama")
        self._closing = threading.Event()
        # an engine that never answered hangs in its destructor where another failed to load before (xllamacpp)
        self.complete("a", max_tokens=1)

    def chat(self, messages: Sequence[Message], *, adapter: str | None = None, **options: Any) -> Completion:
        request = self._request(adapter, options) | {"messages": list(messages)}
        return self._run(request, _Collector(_chat_piece, adapter))

    def complete(self, prompt: str, *, adapter: str | None = None, **options: Any) -> Completion:
        request = self._request(adapter, options) | {"prompt": prompt}
        return self._run(request, _Collector(_text_piece, adapter))

    def stream(
        self, messages: Sequence[Message] | str, *, adapter: str | None = None, **options: Any
    ) -> Iterator[Chunk]:
        asked = {"prompt": messages} if isinstance(messages, str) else {"messages": list(messages)}
        return self._stream(self._request(adapter, options) | asked, adapter)

    def chat_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        adapter: str | None = None,
        max_tokens: int | Sequence[int] = 256,
        temperature: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        logprobs: bool = False,
        progress: Progress = silent,
    ) -> list[Completion]:
        limits = [max_tokens] * len(conversations) if isinstance(max_tokens, int) else max_tokens
        limits = [max(limit, self._least) for limit in limits]
        heats = [temperature] * len(conversations) if isinstance(temperature, int | float) else temperature
        seeds = [seed + index for index in range(len(conversations))] if isinstance(seed, int) else seed
        alike: dict[str, list[int]] = {}
        for index, (messages, *_) in enumerate(zip(conversations, limits, heats, seeds, strict=True)):
            alike.setdefault(_as_text(messages), []).append(index)
        answers: dict[int, Completion] = {}
        stopped = threading.Event()

        def answer(indices: Sequence[int]) -> None:
            for index in indices:
                if stopped.is_set():
                    return
                how = {"adapter": adapter, "max_tokens": limits[index], "temperature": heats[index],
                       "seed": seeds[index], "logprobs": logprobs}  # fmt: skip
                answers[index] = self._answer(conversations[index], how)

        futures = {self._pool.submit(answer, indices): indices for indices in alike.values()}
        done = 0
        try:
            for future in as_completed(futures):
                future.result()
                done += len(futures[future])
                progress(done, len(conversations), f"{answers[futures[future][-1]].completion_tokens} tokens")
        finally:
            stopped.set()
            for future in futures:
                future.cancel()
        return [answers[index] for index in range(len(conversations))]

    def _answer(self, messages: Sequence[Message], how: Mapping[str, Any]) -> Completion:
        """From the answers kept of an earlier run, or anew."""
        if self._kept is None:
            return self.chat(messages, **how)
        request = {"messages": list(messages), "context": self.context, **how}
        request["max_tokens"] = min(request["max_tokens"], self._most)
        found = self._kept.get(request)
        if found is None:
            found = self.chat(messages, **how)
            self._kept.put(request, found)
        return found

    def close(self) -> None:
        """End it; answers under way are given up, so that an interrupt waits for none."""
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._kept:
            self._kept.close()
        self._server = None

    # ---------------------------------------------------------------------------

    def _request(self, adapter: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        if self._server is None:
            raise CogumiError("the engine has been closed", "start it again", retryable=True)
        if adapter is not None and adapter not in self.adapters:
            raise CogumiError(f"no adapter {adapter!r} is loaded", nearest(adapter, self.adapters))
        request = {
            "max_tokens": min(options.get("max_tokens", 256), self._most),
            "temperature": options.get("temperature", 0.0),
            "top_p": options.get("top_p", 1.0),
            "top_k": 0,
            "min_p": 0.0,
            "seed": options.get("seed", 0),
            "stream": True,
            "lora": [{"id": i, "scale": float(name == adapter)} for i, name in enumerate(self.adapters)],
        }
        if options.get("stop"):
            request["stop"] = list(options["stop"])
        if options.get("logprobs"):
            request |= {"logprobs": True, "top_logprobs": 1, "n_probs": 1}
        return request

    def _run(self, request: dict[str, Any], collector: "_Collector") -> Completion:
        """Ask in a slot of the request's own, and wait for the whole answer."""
        chat = "messages" in request
        handle = self._server.handle_chat_completions if chat else self._server.handle_completions
        with self._places.take(
            collector.adapter, _as_text(request["messages"]) if chat else request["prompt"]
        ) as place:
            placed = request | {"id_slot": place.slot, "cache_prompt": place.reuse and self._reuse}
            completion = collector.completion(
                handle(placed, lambda event: collector.receive(event) or self._closing.is_set())
            )
        if self._closing.is_set():  # it may be the beginning of an answer only
            raise CogumiError("the engine has been closed", "start it again", retryable=True)
        return completion

    def _stream(self, request: dict[str, Any], adapter: str | None) -> Iterator[Chunk]:
        pieces: queue.Queue[str | Completion | BaseException] = queue.Queue()
        collector = _Collector(_chat_piece if "messages" in request else _text_piece, adapter, pieces.put)

        def work() -> None:
            try:
                pieces.put(self._run(request, collector))
            except BaseException as error:
                pieces.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                item = pieces.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Completion):
                    yield Chunk("", item)
                    return
                yield Chunk(item)
        finally:
            collector.cancelled = True


def free_cores(seconds: float = 0.3) -> int:
    """Cores that no other process uses just now, at least one.

    llama.cpp's threads wait for each other in spinning barriers: a thread more than there are free
    cores costs more than it brings. With two busy neighbours on two cores, one thread decoded 12
    tokens/s and two threads 5.
    """
    import psutil

    def busy() -> float:
        times = psutil.cpu_times()
        own = psutil.Process().cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0) - own.user - own.system

    before, started = busy(), time.perf_counter()
    time.sleep(seconds)
    others = (busy() - before) / (time.perf_counter() - started)
    return max(1, round((os.cpu_count() or 1) - others))


def _as_text(messages: Sequence[Message]) -> str:
    """Enough of a conversation to compare its beginning with another's."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


Piece = Callable[[dict[str, Any]], str]


def _chat_piece(choice: dict[str, Any]) -> str:
    return choice.get("delta", {}).get("content") or ""


def _text_piece(choice: dict[str, Any]) -> str:
    return choice.get("text") or ""


class _Collector:
    """Gathers the events of one request into a ``Completion``."""

    def __init__(self, piece: Piece, adapter: str | None, listen: Callable[[str], None] | None = None) -> None:
        self.piece, self.adapter, self.listen = piece, adapter, listen
        self.text: list[str] = []
        self.logprobs: list[float] = []
        self.finish = "stop"
        self.prompt_tokens = self.tokens = self.cached = 0
        self.error = ""
        self.cancelled = False
        self.started = time.perf_counter()

    def receive(self, event: Any) -> bool:
        """Called by llama.cpp for each event; returning True stops the generation."""
        for item in event if isinstance(event, list) else [event]:
            if "error" in item:
                self.error = str(item["error"].get("message", item["error"]))
                return True
            for choice in item.get("choices", ()):
                text = self.piece(choice)
                if text:
                    self.text.append(text)
                    if self.listen:
                        self.listen(text)
                found = (choice.get("logprobs") or {}).get("content") or ()
                self.logprobs.extend(min(0.0, float(token["logprob"])) for token in found)
                self.finish = choice.get("finish_reason") or self.finish
            timings = item.get("timings")
            if timings:
                self.cached = timings.get("cache_n", 0)
                self.prompt_tokens = timings["prompt_n"] + self.cached
                self.tokens = timings["predicted_n"]
        return self.cancelled

    def completion(self, result: Any) -> Completion:
        if isinstance(result, dict) and "error" in result:
            self.error = str(result["error"].get("message", result["error"]))
        if self.error:
            if "context" in self.error:
                raise PromptTooLong(f"llama.cpp: {self.error}", "shorten the conversation, or raise serving.context")
            raise CogumiError(f"llama.cpp: {self.error}", "see the message")
        return Completion(
            text="".join(self.text),
            finish_reason="length" if self.finish == "length" else "stop",
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.tokens,
            logprobs=tuple(self.logprobs),
            seconds=time.perf_counter() - self.started,
            adapter=self.adapter,
            cached_tokens=self.cached,
        )
