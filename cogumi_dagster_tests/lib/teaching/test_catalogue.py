import hashlib
from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.teaching.catalogue import Teacher, load_catalogue, prompt_tokens_at_most, teacher_version

SHIPPED = Path(__file__).parents[3] / "resources" / "teachers.yaml"


def teacher(**changes: object) -> Teacher:
    fields: dict[str, object] = {
        "name": "t", "provider": "openai", "model": "m", "tier": 2, "api_key_env": "K",
        "usd_per_million_input": 2.5, "usd_per_million_output": 10.0, "usd_per_million_cached": 1.25,
    }  # fmt: skip
    return Teacher.model_validate(fields | changes)


def load(tmp_path: Path, text: str) -> str:
    path = tmp_path / "teachers.yaml"
    path.write_text(text)
    with pytest.raises(CogumiError) as caught:
        load_catalogue(path)
    return str(caught.value)


def test_shipped_catalogue_loads_with_the_offline_teachers_free_and_every_provider_priced() -> None:
    catalogue = load_catalogue(SHIPPED)
    assert catalogue.get("solver").tier == 3 and catalogue.get("local").tier == 1
    assert {t.provider for t in catalogue.teachers.values()} == {
        "solver", "local", "groq", "openai", "together", "anthropic",
    }  # fmt: skip
    assert all(t.priced for t in catalogue.teachers.values())
    for name in ("solver", "local"):
        assert catalogue.get(name).cost_micros(10_000, 10_000) == 0
        assert catalogue.get(name).stand_in


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(CogumiError, match="did you mean 'solver'"):
        load_catalogue(SHIPPED).get("sovler")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: {provider: local, model: m, tier: 1, temprature: 0.5}", "did you mean 'temperature'"),
        ("a: {provider: groqq, model: m, tier: 1}", "provider"),
        ("a: {provider: local, model: m}", "lacks 'tier'"),
        ("a: {provider: local, model: m, tier: 4}", "tier"),
        ("a: {provider: openai, model: m, tier: 1}", "api_key_env"),
        ("a: {provider: anthropic, model: m, tier: 1, api_key_env: K, temperature: 0.7}", "neither temperature"),
        ("a: {provider: local, model: m, tier: 1, usd_per_million_input: -1}", "usd_per_million_input"),
        ("a: [1]", "no mapping"),
        ("[]", "names no teacher"),
        ("a: {b: [", "not YAML"),
    ],
)
def test_a_broken_catalogue_says_where_and_how_to_mend(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in load(tmp_path, text)


def test_version_follows_what_changes_answers_and_not_prices() -> None:
    base = teacher_version(teacher())
    for change in ({"model": "n"}, {"system_prompt": "x"}, {"temperature": 0.1}, {"base_url": "u"},
                   {"reasoning_effort": "low"}, {"provider": "groq"}):  # fmt: skip
        assert teacher_version(teacher(**change)) != base, change
    for change in ({"usd_per_million_input": 9.0}, {"requests_per_minute": 1}, {"tier": 1}, {"name": "u"}):
        assert teacher_version(teacher(**change)) == base, change
    local = teacher(provider="local", api_key_env=None)
    assert teacher_version(local, "gguf-1") != teacher_version(local, "gguf-2")


def test_cost_is_exact_in_micro_dollars_and_rounds_up() -> None:
    assert teacher().cost_micros(1_000_000, 0) == 2_500_000
    assert teacher().cost_micros(20, 10, cached_tokens=8) == 12 * 2.5 + 8 * 1.25 + 100
    assert teacher(usd_per_million_input=0.1, usd_per_million_output=0.0).cost_micros(1, 0) == 1
    # 0.1 * 3 in binary floats is 0.30000000000000004; exact arithmetic must not round 3 up to 4
    assert teacher(usd_per_million_input=0.1, usd_per_million_output=0.0).cost_micros(30, 0) == 3


def test_an_unknown_price_is_refused_and_not_zero() -> None:
    with pytest.raises(CogumiError, match="no price"):
        teacher(usd_per_million_output=None).cost_micros(1, 1)


def test_worst_case_counts_bytes_and_the_room_for_thinking() -> None:
    text = hashlib.sha256(b"x").hexdigest() + "日本語"
    messages = [Message(role="user", content=text)]
    assert prompt_tokens_at_most(messages) > len(text.encode())
    plain, thinking = teacher(), teacher(reasoning_tokens=1000)
    assert thinking.worst_case_micros(messages, 100) - plain.worst_case_micros(messages, 100) == 10_000
