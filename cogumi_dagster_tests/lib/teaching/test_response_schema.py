"""A judge's answer is held to a schema: on each provider's wire, through the journal, and without it if refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from wire_server import anthropic_reply, chat_reply, error_reply

from cogumi_dagster.lib.curation.judge import SCORES_SCHEMA, score_responses
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching.catalogue import Catalogue, Teacher
from cogumi_dagster.lib.teaching.journal import Journal
from cogumi_dagster.lib.teaching.teach import ResponseRow, VerdictRow

PROVIDERS = ("groq", "openai", "together", "anthropic")
GOOD = json.dumps({"accuracy": 3, "completeness": 2, "coherence": 2, "helpfulness": 3, "reason": "fine"})


def judge(server: Any, provider: str) -> Catalogue:
    teacher = Teacher.model_validate({
        "name": "judge", "provider": provider, "model": "m", "tier": 1, "api_key_env": "CANARY_KEY",
        "usd_per_million_input": 1.0, "usd_per_million_output": 1.0, "requests_per_minute": 100_000,
        "concurrency": 1, "base_url": server.url + ("/v1" if provider == "openai" else ""),
    })  # fmt: skip
    return Catalogue(path="t", teachers={"judge": teacher})


def row(prompt: str) -> ResponseRow:
    return ResponseRow(
        task=Task("math", "file", "easy", prompt).to_json(), teacher="a", tier=1, response="It is 4.",
        verdict=VerdictRow(passed=None, reason="", score=0.0), finish_reason="stop", prompt_tokens=1,
        completion_tokens=1, usd=0.0, stand_in=False,
    )  # fmt: skip


def reply(provider: str, text: str = GOOD) -> Any:
    return anthropic_reply(text) if provider == "anthropic" else chat_reply(text)


def schema_in(body: dict[str, Any]) -> Any:
    if "response_format" in body:
        assert body["response_format"]["type"] == "json_schema" and body["response_format"]["json_schema"]["strict"]
        return body["response_format"]["json_schema"]["schema"]
    return body.get("output_config", {}).get("format", {}).get("schema")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_provider_gets_the_schema_and_a_model_that_refuses_it_is_asked_without(
    server: Any, provider: str, tmp_path: Path
) -> None:
    rows = [row("2+2?"), row("3+1?")]
    server.default = lambda path, body: reply(provider)
    with Journal(tmp_path / "a.db") as journal:
        scored, report = score_responses(
            rows, "judge", catalogue=judge(server, provider), journal=journal, cap_usd=1.0, agreement_set=None
        )
    assert [schema_in(body) for body in server.posts()] == [SCORES_SCHEMA] * 2
    assert [one["quality"]["total"] for one in scored] == [10.0, 10.0] and report.parse_rate == 1.0

    server.seen.clear()
    server.script = [error_reply(400, "this model does not support response format json_schema")]
    with Journal(tmp_path / "b.db") as journal:
        scored, report = score_responses(
            rows, "judge", catalogue=judge(server, provider), journal=journal, cap_usd=1.0, agreement_set=None
        )
    assert [schema_in(body) for body in server.posts()] == [SCORES_SCHEMA, None, None], "refused once, then not sent"
    assert len(scored) == 2


def test_the_labelled_set_goes_through_the_journal_once(server: Any, tmp_path: Path) -> None:
    server.default = lambda path, body: reply("openai")
    for asked in (1 + 40, 1):
        server.seen.clear()
        with Journal(tmp_path / "a.db") as journal:
            _, report = score_responses(
                [row(f"{asked}?")], "judge", catalogue=judge(server, "openai"), journal=journal, cap_usd=1.0
            )
        assert len(server.posts()) == asked
        assert report.agreement and report.agreement.scored == 40
        assert report.agreement.same_side.successes == report.agreement.majority.successes == 22
