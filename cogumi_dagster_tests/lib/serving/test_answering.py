"""The routed model, the manual ones, escalation and streaming, on an engine that says who it is."""

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Chunk, Completion, Message
from cogumi_dagster.lib.serving.answering import Assistant, Params

PARAMS = Params(max_tokens=64)


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def after_an_answer(text: str) -> list[Message]:
    first = [Message(role="user", content="easy code"), Message(role="assistant", content="here")]
    return [*first, *user(text)]


def test_a_sure_base_answers_itself(assistant, engine) -> None:
    routed = assistant.answer(user("easy code"), "cogumi", PARAMS)
    assert (routed.route, routed.modifier, routed.domain) == ("base", None, "code")
    assert routed.completion.text == "base on <easy code> ünï 🙂"
    assert routed.confidence == pytest.approx(0.990, abs=1e-3)
    assert [adapter for adapter, _ in engine.calls] == [None]


def test_an_unsure_base_hands_over_to_the_modifier_of_the_domain(assistant, engine) -> None:
    routed = assistant.answer(user("hard code"), "cogumi", PARAMS)
    assert (routed.route, routed.modifier, routed.escalated) == ("code", "code", False)
    assert routed.completion.text.startswith("code on <hard code>")
    assert routed.confidence == pytest.approx(0.0498, abs=1e-4)
    assert [adapter for adapter, _ in engine.calls] == [None, "code"]


def test_an_unsure_base_without_a_modifier_answers_itself(assistant) -> None:
    routed = assistant.answer(user("a poem"), "cogumi", PARAMS)
    assert (routed.route, routed.modifier, routed.domain) == ("base", None, "creative")


@pytest.mark.parametrize("name", ["base", "code", "reasoning", "automation"])
def test_a_model_named_by_hand_is_not_routed(assistant, engine, router, name: str) -> None:
    routed = assistant.answer(user("hard code"), f"cogumi-{name}", PARAMS)
    assert routed.route == name
    assert routed.confidence is None and routed.domain is None
    assert engine.calls == [(None if name == "base" else name, "hard code")]
    assert router.prompts == []


def test_a_dissatisfied_user_gets_the_modifier_though_the_base_is_sure(assistant) -> None:
    routed = assistant.answer(after_an_answer("wrong, easy code again"), "cogumi", PARAMS)
    assert (routed.route, routed.escalated) == ("code", True)
    assert "dissatisfied" in routed.reason


def test_escalation_needs_an_answer_to_complain_of(assistant) -> None:
    routed = assistant.answer(user("easy code: what is wrong here?"), "cogumi", PARAMS)
    assert (routed.route, routed.escalated) == ("base", False)


def test_escalation_in_a_domain_without_a_modifier_says_so(assistant) -> None:
    routed = assistant.answer(after_an_answer("wrong poem"), "cogumi", PARAMS)
    assert (routed.route, routed.escalated) == ("base", True)
    assert "no modifier" in routed.reason


def test_a_modifier_that_is_not_loaded_leaves_the_base_in_charge(engine, router) -> None:
    engine.adapters = ("reasoning",)
    small = Assistant(engine, router, None)  # type: ignore[arg-type]
    routed = small.answer(user("hard code"), "cogumi", PARAMS)
    assert (routed.route, routed.modifier) == ("base", None)
    assert "not loaded" in routed.reason
    assert small.models == ["cogumi", "cogumi-base", "cogumi-reasoning"]


def test_the_router_sees_the_last_words_of_the_user_only(assistant, router) -> None:
    assistant.answer(after_an_answer("easy and last"), "cogumi", PARAMS)
    assert router.prompts == ["easy and last"]


def test_nothing_is_streamed_before_the_decision(assistant) -> None:
    pieces = list(assistant.stream(user("hard code"), "cogumi", PARAMS))
    texts = [piece.text for piece in pieces if piece.text]
    assert "".join(texts) == "code on <hard code> ünï 🙂"
    assert [piece.routed is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_base_answer_that_stands_is_sent_in_its_own_pieces(assistant) -> None:
    pieces = list(assistant.stream(user("easy one"), "cogumi", PARAMS))
    assert [piece.text for piece in pieces if piece.text] == ["base", " on", " <easy", " one>", " ünï", " 🙂"]
    last = pieces[-1].routed
    assert last is not None and last.completion.text == "base on <easy one> ünï 🙂"


@pytest.mark.parametrize(("model", "until"), [("cogumi", "base"), ("cogumi", "code"), ("cogumi-code", "code")])
def test_closing_the_stream_frees_the_slot(assistant, engine, model: str, until: str) -> None:
    stream = assistant.stream(user("hard code"), model, PARAMS)
    for piece in stream:
        assert piece.routed is None
        if engine.calls[-1][0] == (None if until == "base" else until):
            break
    assert engine.active == 1
    stream.close()
    assert (engine.active, engine.given_up) == (0, 1)


def test_sampling_reaches_the_engine_for_base_and_modifier(assistant, engine) -> None:
    params = Params(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("x",))
    assistant.answer(user("hard code"), "cogumi", params)
    wanted = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ("x",)}
    assert engine.samplings == [wanted | {"logprobs": True}, wanted | {"logprobs": False}], "only the router reads them"


def test_raw_text_is_routed_too(assistant, engine) -> None:
    routed = assistant.answer("hard code", "cogumi", PARAMS)
    assert routed.route == "code"
    assert engine.calls == [(None, "hard code"), ("code", "hard code")]


def test_an_unknown_model_names_the_nearest(assistant) -> None:
    with pytest.raises(CogumiError, match="did you mean 'cogumi-code'"):
        assistant.answer(user("x"), "cogumi-coed", PARAMS)


def test_a_base_answer_without_log_probabilities_is_not_routed_blindly(assistant, engine, monkeypatch) -> None:
    blind = Completion("text", "stop", 1, 1, ())
    monkeypatch.setattr(engine, "stream", lambda *a, **k: (chunk for chunk in [Chunk("text", blind)]))
    with pytest.raises(CogumiError, match="log-probabilities"):
        assistant.answer("x", "cogumi", PARAMS)
