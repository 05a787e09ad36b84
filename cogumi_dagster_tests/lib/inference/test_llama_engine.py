import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.compression.gguf_lora import export_lora
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference import llama
from cogumi_dagster.lib.inference.base import Completion, Message
from cogumi_dagster.lib.inference.kept import MODELS, KeptAnswers
from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.training.batches import prompt_ids
from cogumi_dagster.lib.training.student import load_checkpoint

PROMPTS = ("What is 3 plus 3?", "What is the river?", "Again the green window")
NAMES = (None, "one", "two")


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def adapters(
    student: Path, adapter: Path, opposite_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    export_lora(adapter, folder / "one.gguf", base=student, contract={})
    export_lora(opposite_adapter, folder / "two.gguf", base=student, contract={})
    return {"one": folder / "one.gguf", "two": folder / "two.gguf"}


@pytest.fixture(scope="module")
def engine(f16_gguf: Path, adapters: dict[str, Path]) -> Iterator[LlamaEngine]:
    running = LlamaEngine(f16_gguf, adapters, slots=2, context=256)
    yield running
    running.close()


@pytest.fixture(scope="module")
def separate(f16_gguf: Path, adapters: dict[str, Path]) -> dict[tuple[str | None, str], tuple[float, ...]]:
    """What each (adapter, prompt) answers on an engine of its own that never had another adapter."""
    answers = {}
    for name in NAMES:
        alone = LlamaEngine(f16_gguf, {name: adapters[name]} if name else None, slots=1, context=256)
        for prompt in PROMPTS:
            answers[name, prompt] = alone.chat(ask(prompt), adapter=name, max_tokens=8, logprobs=True).logprobs
        alone.close()
    return answers


def test_base_and_adapters_differ(separate: dict[tuple[str | None, str], tuple[float, ...]]) -> None:
    for prompt in PROMPTS:
        assert len({separate[name, prompt] for name in NAMES}) == 3


def test_interleaved_adapters_do_not_contaminate_each_other(
    engine: LlamaEngine, separate: dict[tuple[str | None, str], tuple[float, ...]]
) -> None:
    for prompt in (*PROMPTS, *PROMPTS[::-1]):  # the same prompt under each adapter in turn, then once more
        for name in NAMES:
            answer = engine.chat(ask(prompt), adapter=name, max_tokens=8, logprobs=True)
            assert answer.logprobs == pytest.approx(separate[name, prompt], abs=1e-3)
            assert answer.adapter == name


def test_concurrent_adapters_do_not_contaminate_each_other(
    engine: LlamaEngine, separate: dict[tuple[str | None, str], tuple[float, ...]]
) -> None:
    jobs = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda job: engine.chat(ask(job[1]), adapter=job[0], max_tokens=8, logprobs=True), jobs)
        )
    for job, answer in zip(jobs, answers, strict=True):
        assert answer.logprobs[:1] == pytest.approx(separate[job][:1], abs=1e-2)


def test_a_conversation_goes_on_from_its_cache_and_says_the_same(f16_gguf: Path, adapters: dict[str, Path]) -> None:
    engine = LlamaEngine(f16_gguf, adapters, slots=1, context=256)
    first = ask("Tell me of the river and the green window " * 4)
    for adapter in ("one", None):
        turn = [*first, {"role": "assistant", "content": engine.chat(first, adapter=adapter, max_tokens=8).text}]
        turn.append({"role": "user", "content": "And then?"})
        continued = engine.chat(turn, adapter=adapter, max_tokens=8, logprobs=True)
        assert 0 < continued.cached_tokens < continued.prompt_tokens
        assert engine.chat(turn, adapter="two", max_tokens=1).cached_tokens == 0, "another adapter's cache is not read"
        cold = engine.chat(turn, adapter=adapter, max_tokens=8, logprobs=True)
        assert (cold.cached_tokens, cold.prompt_tokens) == (0, continued.prompt_tokens)
        assert cold.logprobs == pytest.approx(continued.logprobs, abs=1e-2), "but for rounding"
    engine.close()


def test_the_counts_are_those_of_the_tokenizer(engine: LlamaEngine, student: Path) -> None:
    _, tokenizer = load_checkpoint(student)
    answer = engine.chat(ask(PROMPTS[0]), max_tokens=5, logprobs=True)
    assert answer.prompt_tokens == len(prompt_ids(tokenizer, PROMPTS[0]))
    assert 0 < len(answer.logprobs) <= answer.completion_tokens <= 5  # a token that is half a character has none
    assert answer.finish_reason == ("length" if answer.completion_tokens == 5 else "stop")
    assert all(value <= 0 for value in answer.logprobs)


def test_the_log_probability_is_that_of_transformers(engine: LlamaEngine, student: Path) -> None:
    import torch

    model, tokenizer = load_checkpoint(student, "float32")
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids(tokenizer, PROMPTS[0])])).logits[0, -1]
    assert engine.chat(ask(PROMPTS[0]), max_tokens=1, logprobs=True).logprobs[0] == pytest.approx(
        float(torch.log_softmax(logits, -1).max()), abs=1e-2
    )


def test_answers_are_capped_where_the_profile_says_so(f16_gguf: Path) -> None:
    engine = LlamaEngine(f16_gguf, slots=1, context=256, max_answer_tokens=3)
    assert engine.chat(ask(PROMPTS[0]), max_tokens=20).completion_tokens <= 3
    assert engine.chat(ask(PROMPTS[0]), max_tokens=2).completion_tokens <= 2
    engine.close()


def test_a_stream_is_the_answer_in_pieces(engine: LlamaEngine) -> None:
    whole = engine.chat(ask(PROMPTS[1]), adapter="one", max_tokens=8, logprobs=True)
    *pieces, last = engine.stream(ask(PROMPTS[1]), adapter="one", max_tokens=8, logprobs=True)
    assert last.completion is not None
    assert "".join(piece.text for piece in pieces) == last.completion.text == whole.text
    assert last.completion.logprobs == pytest.approx(whole.logprobs, abs=1e-3)


def test_closing_a_stream_frees_its_slot(f16_gguf: Path) -> None:
    engine = LlamaEngine(f16_gguf, slots=1, context=4096)
    stream = engine.stream(ask(PROMPTS[0]), max_tokens=4000)
    next(stream)
    stream.close()
    # the only slot answers again, and long before 4,000 tokens would be done
    assert engine.chat(ask(PROMPTS[0]), max_tokens=2).completion_tokens <= 2
    engine.close()


def test_many_are_answered_in_order_with_their_own_limits(engine: LlamaEngine) -> None:
    seen: list[int] = []
    answers = engine.chat_many(
        [ask(prompt) for prompt in PROMPTS],
        max_tokens=[1, 2, 3],
        logprobs=True,
        progress=lambda done, total, note: seen.append(done),
    )
    assert [answer.completion_tokens for answer in answers] == [1, 2, 3]
    assert seen == [1, 2, 3]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.logprobs[0] == pytest.approx(
            engine.chat(ask(prompt), max_tokens=1, logprobs=True).logprobs[0], abs=1e-2
        )


def test_samples_of_one_prompt_read_it_once(engine: LlamaEngine) -> None:
    prompt = " ".join(PROMPTS) * 3
    alone = engine.chat(ask(prompt), max_tokens=6)
    other, first, second, third = engine.chat_many(
        [ask(PROMPTS[0]), ask(prompt), ask(prompt), ask(prompt)], max_tokens=6, temperature=[0.0, 0.0, 1.5, 1.5]
    )
    assert first.text == alone.text and len({first.text, second.text, third.text}) > 1
    assert min(second.cached_tokens, third.cached_tokens) >= 0.9 * first.prompt_tokens
    assert other.prompt_tokens < first.prompt_tokens


def test_what_was_answered_before_a_kill_is_not_asked_again(f16_gguf: Path, tmp_path: Path) -> None:
    kept = tmp_path / "answers"
    how: dict[str, Any] = {"max_tokens": 4, "logprobs": True}

    first = LlamaEngine(f16_gguf, slots=1, kept=kept)
    answer = first.chat

    def killed(messages: Any, **options: Any) -> Any:
        if messages == ask(PROMPTS[1]):
            raise KeyboardInterrupt
        return answer(messages, **options)

    first.chat = killed  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        first.chat_many([ask(prompt) for prompt in PROMPTS], **how)
    first.close()
    (file,) = kept.iterdir()
    lines = [line for line in file.read_text().splitlines() if line]
    assert 1 <= len(lines) < len(PROMPTS)
    file.write_text("\n".join(lines) + '\n{"request": "cut o')

    second = LlamaEngine(f16_gguf, slots=1, kept=kept)
    asked: list[Any] = []
    plain = second.chat
    second.chat = lambda messages, **options: asked.append(messages) or plain(messages, **options)  # type: ignore
    answers = second.chat_many([ask(prompt) for prompt in PROMPTS], **how)
    second.close()
    assert len(asked) == len(PROMPTS) - len(lines)
    third = LlamaEngine(f16_gguf, slots=1, kept=kept)
    third.chat = None  # type: ignore
    assert third.chat_many([ask(prompt) for prompt in PROMPTS], **how) == answers, "and the cut line did no harm"
    third.close()
    whole = LlamaEngine(f16_gguf, slots=1)
    assert [a.text for a in whole.chat_many([ask(prompt) for prompt in PROMPTS], **how)] == [a.text for a in answers]
    whole.close()


def test_kept_answers_belong_to_their_model_and_adapter(f16_gguf: Path, tmp_path: Path) -> None:
    adapters = {name: tmp_path / f"{name}.gguf" for name in ("one", "same", "other")}
    for name, path in adapters.items():
        path.write_text("other" if name == "other" else "one")
    kept = KeptAnswers(tmp_path / "answers", f16_gguf, adapters)
    request = {"messages": ask("a"), "adapter": "one", "temperature": 0.0, "seed": 1}
    answer = Completion("x", "stop", 1, 1, (-0.5,), 0.1, "one")
    kept.put(request, answer)
    assert kept.get(request) == answer, "at once"
    kept.close()
    again = KeptAnswers(tmp_path / "answers", f16_gguf, adapters)
    assert again.get({**request, "seed": 2}) == answer, "greedy decoding has no seed"
    found = again.get({**request, "adapter": "same"})
    assert found is not None and found.adapter == "same", "the same adapter by another name"
    others: list[dict[str, Any]] = [
        {"adapter": "other"},
        {"adapter": None},
        {"temperature": 0.7},
        {"messages": ask("b")},
    ]
    assert all(again.get({**request, **other}) is None for other in others)
    sampled = {**request, "temperature": 0.7}
    again.put(sampled, answer)
    assert again.get(sampled) == answer and again.get({**sampled, "seed": 2}) is None
    again.close()
    bases = [tmp_path / f"base{n}.gguf" for n in range(6)]
    for base in bases:
        base.write_text(base.name)
        KeptAnswers(tmp_path / "answers", base, {}).close()
    assert len(list((tmp_path / "answers").iterdir())) == MODELS, "those of the newest models"


def test_log_probabilities_are_given_only_where_they_are_asked_for(engine: LlamaEngine) -> None:
    assert engine.chat(ask(PROMPTS[0]), max_tokens=3).logprobs == ()


def test_raw_text_is_continued_without_the_template(engine: LlamaEngine, student: Path) -> None:
    _, tokenizer = load_checkpoint(student)
    answer = engine.complete(PROMPTS[0], max_tokens=3, logprobs=True)
    assert answer.prompt_tokens == len(tokenizer.encode(PROMPTS[0], add_special_tokens=False))
    assert 0 < len(answer.logprobs) <= answer.completion_tokens == 3
    *pieces, last = engine.stream(PROMPTS[0], max_tokens=3, logprobs=True)
    assert (
        last.completion is not None and "".join(piece.text for piece in pieces) == last.completion.text == answer.text
    )


def test_the_seed_decides_a_sampled_answer(engine: LlamaEngine) -> None:
    texts = [engine.chat(ask(PROMPTS[0]), max_tokens=12, temperature=2.0, seed=seed).text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_prompt_longer_than_the_context_is_an_error(engine: LlamaEngine) -> None:
    with pytest.raises(CogumiError, match="context") as caught:
        engine.chat(ask("river " * 2000), max_tokens=2)
    assert "shorten the conversation" in caught.value.mend
    with pytest.raises(CogumiError, match="context"):
        list(engine.stream(ask("river " * 2000), max_tokens=2))
    assert engine.chat(ask(PROMPTS[0]), max_tokens=1).completion_tokens == 1, "the engine still answers"


def test_an_unknown_adapter_names_the_nearest(engine: LlamaEngine) -> None:
    with pytest.raises(CogumiError, match="no adapter 'ones' is loaded") as caught:
        engine.chat(ask("x"), adapter="ones")
    assert caught.value.mend == "did you mean 'one'?"


def test_what_cannot_be_loaded_is_an_error(tmp_path: Path, f16_gguf: Path) -> None:
    with pytest.raises(CogumiError, match="there is no model file"):
        LlamaEngine(tmp_path / "none.gguf")
    with pytest.raises(CogumiError, match="there is no model file"):
        LlamaEngine(f16_gguf, {"one": tmp_path / "none.gguf"})
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(CogumiError, match="could not load"):
        LlamaEngine(tmp_path / "bad.gguf")


def test_an_engine_closes_though_another_failed_to_load(tmp_path: Path, f16_gguf: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(CogumiError, match="could not load"):
        LlamaEngine(tmp_path / "bad.gguf")
    LlamaEngine(f16_gguf, slots=1, context=64).close()


def test_a_closed_engine_says_so(f16_gguf: Path) -> None:
    engine = LlamaEngine(f16_gguf, slots=1, context=64)
    engine.close()
    with pytest.raises(CogumiError, match="has been closed"):
        engine.chat(ask("x"))


def test_closing_gives_up_what_is_under_way_and_keeps_no_part_of_it(
    f16_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LlamaEngine(f16_gguf, slots=1, context=256, kept=tmp_path)
    begun, receive, events = threading.Event(), llama._Collector.receive, []

    def slow(collector: Any, event: Any) -> bool:
        events.append(event)
        begun.set()
        assert engine._closing.wait(60)
        return receive(collector, event)

    monkeypatch.setattr(llama._Collector, "receive", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.chat_many, [ask("Go on and on.")], max_tokens=200)
        assert begun.wait(60)
        engine.close()
        with pytest.raises(CogumiError, match="has been closed"):
            asked.result(timeout=60)
    assert len(events) < 50
    assert not any(file.read_text() for file in tmp_path.iterdir()), "part of an answer is none"
