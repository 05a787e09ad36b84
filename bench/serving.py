"""Serving: how fast each type of weights reads prompts and decodes, and what adapters cost.

    python bench/serving.py types FILE.gguf ... [--slots 8]
    python bench/serving.py turns FILE.gguf
    python bench/serving.py adapters BASE.gguf NAME=ADAPTER.gguf ... [--requests 1000] [--slots 8]

``types``: the same 24 prompts with up to 60 tokens of answer each, and with one, in all slots.

``turns``: a conversation of six turns, the wait for each answer's first token, with and without the slot's cache.

``adapters``: hot swap, and whether one request's adapter ever touches another's answer. ``load``: opening the base with
all adapters less opening it alone, an adapter. ``switch``: the time of a one-token request after one with another
adapter, less after one with the same. ``first token``: what a user waits for, with the slots' caches as served: a new
prompt and a conversation's next turn, each after the same adapter and after another (whose cache is of no use).
``decode``: tokens a second with each adapter and without, in turn, alone and
in all slots. ``interleaved``: requests with adapters in random order, several at once, each answer against the one that
the same adapter gave to the same prompt alone. What batches move by rounding is measured beside it: the same requests,
as many at once, one adapter after the other. An answer counts as contaminated where its tokens' log-probabilities are
further off than any of those and nearer to another adapter's. An answer of another text is no sign of it by itself:
where two tokens are as likely, rounding chooses between them, and it is often the other that another adapter prefers.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from cogumi_dagster.lib.inference import Message
from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.tasks import draw_tasks, families_of

ANSWER_TOKENS = 8
Chat = list[Message]


def prompts(count: int) -> list[Chat]:
    """Short ones, on which adapters differ."""
    names = [name for domain in ("reasoning", "math", "automation") for name in families_of(domain)]
    drawn = sorted((task.prompt for task in draw_tasks(names, 8 * count, 0)), key=len)
    return [[{"role": "user", "content": prompt}] for prompt in drawn[:count]]


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def load(base: Path, adapters: dict[str, Path], rounds: int = 9) -> None:
    def opened(with_adapters: dict[str, Path]) -> None:
        LlamaEngine(base, with_adapters, slots=1, context=256, threads=1).close()

    opened(adapters)  # the files are in memory from here on
    alone, together = [], []
    for _ in range(rounds):
        alone.append(seconds(lambda: opened({})))
        together.append(seconds(lambda: opened(adapters)))
    each = (min(together) - min(alone)) / len(adapters)
    print(
        f"| load, an adapter (aim: < 30 ms) | {1000 * each:.1f} ms; the base {1000 * min(alone):.0f} ms |", flush=True
    )


def switch(engine: LlamaEngine, names: Sequence[str | None], rounds: int = 200) -> None:
    def one(adapter: str | None) -> float:
        return seconds(lambda: engine.complete("The", adapter=adapter, max_tokens=1))

    same, changed = [], []
    draw = random.Random(0)
    last = names[0]
    one(last)
    for _ in range(rounds):  # in turn, so that both see the same neighbours
        same.append(one(last))
        last = draw.choice([name for name in names if name != last])
        changed.append(one(last))
        one(last)
    cost = statistics.median(changed) - statistics.median(same)
    print(f"| switch (aim: < 1 ms) | {1000 * cost:+.2f} ms on {1000 * statistics.median(same):.1f} ms |", flush=True)


def first_token(base: Path, adapters: dict[str, Path], slots: int, rounds: int = 25) -> None:
    words = Path(__file__).with_name("training.py").read_text().split()
    draw, names = random.Random(2), [None, *adapters]
    engine = LlamaEngine(base, adapters, slots=slots, context=1024, reuse_prompts=True)

    def wait(chat: Chat, adapter: str | None) -> float:
        started = time.perf_counter()
        stream = engine.stream(chat, adapter=adapter, max_tokens=4)
        first = next(stream)
        waited = time.perf_counter() - started
        chat.append({"role": "assistant", "content": first.text + "".join(chunk.text for chunk in stream)})
        return waited

    def turn() -> Message:
        return {"role": "user", "content": " ".join(draw.choices(words, k=60))}

    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for other in (False, True):  # in turn, so that both see the same neighbours
            own = draw.choice(names)
            next_one = draw.choice([name for name in names if name != own]) if other else own
            wait([turn()], own)
            chat = [turn()]
            found.setdefault(("a new prompt", other), []).append(wait(chat, next_one))
            chat.append(turn())
            last = draw.choice([name for name in names if name != next_one]) if other else next_one
            found.setdefault(("the next turn of a conversation", other), []).append(wait(chat, last))
    engine.close()
    for what in ("a new prompt", "the next turn of a conversation"):
        same, changed = (1000 * statistics.median(found[what, other]) for other in (False, True))
        print(
            f"| first token of {what}, 60 words more | {same:.0f} ms after the same adapter, "
            f"{changed:.0f} ms after another |",
            flush=True,
        )


def decode(engine: LlamaEngine, names: Sequence[str | None], chats: Sequence[Chat], rounds: int = 5) -> None:
    """Tokens a second while all streams decode: after the last one's first token, before the first one's last."""

    def arrivals(chat: Chat, adapter: str | None) -> list[float]:
        return [time.perf_counter() for chunk in engine.stream(chat, adapter=adapter, max_tokens=64) if chunk.text]

    def speed(adapter: str | None, at_once: Sequence[Chat]) -> float:
        with ThreadPoolExecutor(len(at_once)) as pool:
            streams = list(pool.map(lambda chat: arrivals(chat, adapter), at_once))
        begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
        inside = sum(begin < moment <= end for times in streams for moment in times)
        return inside / (end - begin) if end > begin else float("nan")

    for label, at_once in (("one stream", chats[:1]), (f"{engine.slots} streams", chats[: engine.slots])):
        found: dict[str | None, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                found[name].append(speed(name, at_once))
        base = statistics.median(found[None])
        pairs = {n: [a / b for a, b in zip(found[n], found[None], strict=True)] for n in names if n}
        shares = ", ".join(f"{name} {statistics.median(ratios):.2f}" for name, ratios in pairs.items())
        print(f"| decode, {label} (aim: >= 0.85 of the base) | base {base:.0f} tokens/s; {shares} |", flush=True)


class Answer(NamedTuple):
    """Its tokens as text and how it ended, and the tokens' natural-log probabilities (the end has none)."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    def off(self, other: "Answer") -> float:
        """The largest difference of log-probabilities up to and with the first token that differs, in nats.

        Where rounding chooses between two tokens, each is the likelier by less than what rounding moves: so their
        log-probabilities, each from the answer that took it, are no further apart than those of a token in both.
        """
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, other.tokens, strict=False)))
        pairs = zip(self.logprobs[: alike + 1], other.logprobs[: alike + 1], strict=False)
        return max((abs(mine - its) for mine, its in pairs), default=0.0)


def interleaved(engine: LlamaEngine, names: Sequence[str | None], chats: Sequence[Chat], requests: int) -> None:
    def ask(request: tuple[str | None, int]) -> Answer:
        name, place = request
        chunks = list(engine.stream(chats[place], adapter=name, max_tokens=ANSWER_TOKENS, logprobs=True))
        whole = chunks[-1].completion
        assert whole is not None
        tokens = tuple(chunk.text for chunk in chunks[:-1])
        assert len(tokens) == len(whole.logprobs), whole
        return Answer((*tokens, whole.finish_reason), whole.logprobs)

    alone = {(name, place): ask((name, place)) for name in names for place in range(len(chats))}
    draw = random.Random(1)
    asked = [(draw.choice(list(names)), draw.randrange(len(chats))) for _ in range(requests)]
    with ThreadPoolExecutor(engine.slots) as pool:
        by_adapter = [[request for request in asked if request[0] == name] for name in names]
        apart = [
            (request, answer)
            for group in by_adapter
            for request, answer in zip(group, pool.map(ask, group), strict=True)
        ]
        mixed = list(zip(asked, pool.map(ask, asked), strict=True))

    rounding = max(answer.off(alone[request]) for request, answer in apart)
    for what, answers in (("one adapter after the other", apart), ("interleaved", mixed)):
        off = [answer.off(alone[request]) for request, answer in answers]
        differ = [
            (request, moved)
            for moved, (request, answer) in zip(off, answers, strict=True)
            if answer.tokens != alone[request].tokens
        ]
        print(
            f"| {len(answers):,} requests, {what}, {engine.slots} at once | {len(answers) - len(differ):,} equal to "
            f"the same request alone; log-probabilities off by {statistics.fmean(off):.4f} on average, at most "
            f"{max(off):.3f}; those of another text are {len({request for request, _ in differ})} requests, off by at "
            f"most {max((moved for _, moved in differ), default=0.0):.3f} |",
            flush=True,
        )
    foreign = sum(
        rounding < answer.off(alone[request]) > min(answer.off(alone[n, request[1]]) for n in names if n != request[0])
        for request, answer in mixed
    )
    print(f"| interleaved, further off than any unmixed and nearer to another adapter's | {foreign} |")
    between = [answer.off(alone[n, place]) for (name, place), answer in alone.items() for n in names if n != name]
    print(
        f"| an adapter's answer alone against another's | {statistics.median(between):.3f} off (median); "
        f"{sum(gap > rounding for gap in between)} of {len(between)} by more than rounding moves |"
    )


def turns(base: Path, count: int = 6) -> None:
    words = Path(__file__).with_name("training.py").read_text().split()
    found = {}
    for reuse in (False, True):
        engine = LlamaEngine(base, slots=4, context=2048, reuse_prompts=reuse)
        draw, conversation, waits = random.Random(1), Chat(), []
        for _ in range(count):
            conversation.append({"role": "user", "content": " ".join(draw.choices(words, k=40))})
            started = time.perf_counter()
            stream = engine.stream(conversation, max_tokens=40)
            first = next(stream)
            waits.append(time.perf_counter() - started)
            conversation.append({"role": "assistant", "content": first.text + "".join(chunk.text for chunk in stream)})
        engine.close()
        found[reuse] = waits
    print("| turn | first token, everything read again | from the slot's cache |\n|---|---|---|")
    for turn, (cold, warm) in enumerate(zip(found[False], found[True], strict=True), 1):
        print(f"| {turn} | {cold:.2f} s | {warm:.2f} s |")


def types(files: Sequence[Path], slots: int) -> None:
    words = Path(__file__).with_name("training.py").read_text().split()
    draw = random.Random(1)
    chats: list[Chat] = [[{"role": "user", "content": " ".join(draw.choices(words, k=60))}] for _ in range(24)]
    print("| file | prompt, tokens/s | answers, tokens/s |\n|---|---|---|")
    for path in files:
        engine = LlamaEngine(path, slots=slots, context=1024, reuse_prompts=False)
        started = time.perf_counter()
        first = engine.chat_many(chats, max_tokens=1)
        prompt_seconds = time.perf_counter() - started
        started = time.perf_counter()
        answers = engine.chat_many(chats, max_tokens=60)
        rest = time.perf_counter() - started - prompt_seconds
        engine.close()
        prompts_read = sum(answer.prompt_tokens for answer in first) / prompt_seconds
        decoded = sum(answer.completion_tokens - 1 for answer in answers) / rest
        print(f"| {path.name} | {prompts_read:.0f} | {decoded:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["types", "turns", "adapters"])
    parser.add_argument("base", type=Path)
    parser.add_argument("others", nargs="*", help="more files, or NAME=FILE")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.what == "turns":
        turns(arguments.base)
        return
    if arguments.what == "types":
        types([arguments.base, *map(Path, arguments.others)], arguments.slots)
        return
    adapters = {name: Path(path) for name, path in (text.split("=", 1) for text in arguments.others)}
    names: list[str | None] = [None, *adapters]
    print("| figure | value |\n|---|---|")
    load(arguments.base, adapters)
    chats: list[Chat] = [[{"role": "user", "content": f"Count from {n} upwards, number by number."}] for n in range(12)]
    engine = LlamaEngine(arguments.base, adapters, slots=arguments.slots, context=512, reuse_prompts=False)
    switch(engine, names)
    decode(engine, names, chats)
    engine.close()
    first_token(arguments.base, adapters, arguments.slots)
    for reuse in (True, False):  # as it serves, and with every prompt read anew
        print("| prompts from the slots' caches | |" if reuse else "| prompts read anew | |")
        engine = LlamaEngine(arguments.base, adapters, slots=arguments.slots, context=512, reuse_prompts=reuse)
        interleaved(engine, names, prompts(12), arguments.requests)
        engine.close()


if __name__ == "__main__":
    main()
