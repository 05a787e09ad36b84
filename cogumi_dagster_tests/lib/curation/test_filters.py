"""Each filter by what it must drop and what it must not."""

import codecs
from typing import Any

import pytest

from cogumi_dagster.lib.curation.filters import curate, licence, malformed, offensive, repetition
from cogumi_dagster.lib.curation.language import foreign_language
from cogumi_dagster.lib.curation.pii import pii
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import FilterConfig

PLAIN = FilterConfig(min_tokens=3, max_tokens=400)


def row(
    prompt: str = "How does a kettle work?", response: str = "It heats water until the water boils.", **more: Any
) -> Any:
    task = {"id": more.pop("id", "t"), "prompt": prompt, "licence": more.pop("licence", "MIT")}
    return {"task": task, "teacher": "t", "response": response, "quality": {"total": more.pop("total", 9.0)}, **more}


def words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


# --- personal data


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Write to jane.doe+news@acme-mail.co.uk for it", "pii:email"),
        ("call me on (212) 867-5309 tonight", "pii:phone"),
        ("call 212-867-5309.", "pii:phone"),
        ("call +1 212.867.5309", "pii:phone"),
        ("ring +44 20 7946 0958 in London", "pii:phone"),
        ("ring +49 (30) 901820 5", "pii:phone"),
        ("my card is 4539 5787 6362 1486", "pii:card"),
        ("my card is 4539578763621486,", "pii:card"),
        ("amex 3782-822463-10005", "pii:card"),
        ("SSN: 536-90-4399", "pii:national-id"),
        ("the host is 93.184.216.34:8080", "pii:ipv4"),
        ("key = 'sk-proj-9fK2mQ8zLx0aVb7TnR4cWy1D'", "pii:key"),
        ("AKIAQ3EGRT7YUHW2ZK5D", "pii:key"),
        ("token ghp_a8Jd92kLmQ0pZx7Vb3Nt6Rw1Yc5Ef4Gh2Uj9", "pii:key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "pii:key"),
        ("-----BEGIN PRIVATE KEY-----", "pii:key"),
    ],
)
def test_pii_is_found(text: str, reason: str) -> None:
    assert pii(text) == reason


@pytest.mark.parametrize(
    "text",
    [
        "mail user@example.com, or root@db.localhost, or ops@test.invalid",
        "@property\ndef name(self): ...  # see https://example.com/@user",
        "git clone git@github.com:acme/tool.git",
        "the helpline in the film is 555-0142, or 212-555-0199",
        "500-200-1000 = -700 and 3 + 212-867-5309 = ?",
        "x = 12345678901234567890 and 1763762400000 ms",
        "digits 4 5 3 9 5 7 8 7 6 3 6 2 1 4 8 7 sorted",
        "4539 5787 6362 1487 fails the check digit; 9999999999999995 is no brand",
        "1234-5678-9012-3456",
        "123-45-6789 is the placeholder, 000-12-3456 and 536-00-4399 are never issued",
        "ping 192.168.1.10, 10.0.0.1, 127.0.0.1, 8.8.8.8; version 11.22.33.44; see 3.2.1.4 and 999.1.1.10",
        "sk-your-api-key-goes-here-please, sk-xxxxxxxxxxxxxxxxxxxxxxxx1, AKIAIOSFODNN7EXAMPLE",
        "desk-management-and-task-management-software-2024",
        "-----BEGIN PUBLIC KEY-----",
        "On 2024-11-05 at 12:30 we sold 1,234,567 units (3.14 % more) in 48 states.",
    ],
)
def test_what_looks_like_pii_is_not(text: str) -> None:
    assert pii(text) is None


# --- language


FRENCH = "Paris est la capitale de la France et la ville la plus peuplée du pays, avec deux millions d'habitants."


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (FRENCH, "fr"),
        ("Das ist ein kurzer deutscher Text, der ungefähr so lang ist wie eine gewöhnliche Antwort.", "de"),
        ("El gato se sienta en la mesa y come pescado mientras los niños juegan en el jardín.", "es"),
        ("Dit is een Nederlandse tekst die lang genoeg is om te worden herkend als een andere taal.", "nl"),
        ("Это русский текст, который достаточно длинный для того, чтобы определить язык ответа.", "ru"),
        ("这是一个用中文写的回答它足够长可以判断它的语言是中文而不是英文。", "zh"),
    ],
)
def test_another_language_is_named(text: str, code: str) -> None:
    assert foreign_language(text, ("en",)) == code
    assert foreign_language(text, ("en", code)) is None


@pytest.mark.parametrize(
    "text",
    [
        "Oui, merci beaucoup.",
        "42",
        "def mediane(valeurs):\n    triees = sorted(valeurs)\n    milieu = len(triees) // 2\n    return triees[milieu]",
        "const vowels = ['a', 'e', 'i', 'o'];\nlet element = document.querySelector('span');\nconsole.log(element);",
        "```python\n" + f"print({FRENCH!r})\n" * 3 + "```",
        "Natasha = 30 * 7 = 210 minutes\nEsteban = 10 * 9 = 90 minutes\nTotal = 210 + 90 = 300 minutes",
        "factorial :: Integer -> Integer\nfactorial 0 = 1\nfactorial n = n * factorial (n - 1)",
        "import random\n\nprint(random.randint(1, 6))",
        "$\\int_0^1 x^2 dx = \\frac{1}{3}$ so $x = 1/3$",
    ],
)
def test_code_formulas_and_short_texts_are_kept(text: str) -> None:
    assert foreign_language(text, ("en",)) is None


def test_english_is_foreign_where_it_is_not_asked_for() -> None:
    english = "The answer to this is that it works because of how the parts have been built and put together."
    assert foreign_language(english, ("fr",)) == "en"
    assert foreign_language(english, ("en",)) is None


def test_an_english_question_with_a_french_answer_is_dropped_and_one_that_quotes_french_is_not() -> None:
    asked = "What is the capital of France, and how many people live there? Explain it in a sentence."
    kept, report = curate([row(asked, FRENCH), row(f"Translate this into English: {FRENCH}", asked)], PLAIN, 7.0, words)
    assert report.dropped == {"language:fr": 1}
    assert kept[0]["response"] == asked


# --- repetition, licences, offence, form


def test_loops_are_dropped_by_gophers_rules() -> None:
    varied = " ".join(f"word{n} other{n * 7 % 31}" for n in range(40))
    assert repetition(varied) is None
    assert repetition("the cat " * 40) == "repetition:top-2-gram"
    assert repetition(varied + " and then we" * 50) == "repetition:top-3-gram"
    sentence = "this rather long line says the same thing each time\n"
    assert repetition(sentence * 4 + varied) == "repetition:lines"
    assert repetition((sentence + "\n") * 4 + varied) == "repetition:paragraphs"
    half = " ".join(f"w{n}" for n in range(70))
    assert repetition(f"{half} {half}") == "repetition:duplicate-5-grams"


def test_short_answers_and_code_may_repeat() -> None:
    assert repetition("no " * 49) is None
    assert repetition("```\n" + "    x = x + 1\n    return x\n" * 40 + "```\nDone.") is None
    closing = "\n".join(f"if first{n} equals second{n} under rule{n}:\n    return False" for n in range(12))
    assert repetition(closing) is None


@pytest.mark.parametrize(
    ("declared", "text", "reason"),
    [
        ("MIT", "# it under the terms of the GNU Affero General Public License as", "licence:agpl-header"),
        ("MIT", "// SPDX-License-Identifier: GPL-3.0-only", "licence:gpl-header"),
        ("MIT", "/* Copyright 2020 Acme. All rights reserved. */", "licence:all-rights-reserved"),
        ("MIT", "This file is PROPRIETARY AND CONFIDENTIAL", "licence:confidential"),
        ("CC BY-NC 4.0", "fine", "licence:declared-nc"),
        ("CC-BY-NC-SA-4.0", "fine", "licence:declared-nc"),
        ("AGPL-3.0", "fine", "licence:declared-agpl"),
        ("CC BY-SA 4.0", "fine", None),
        ("Apache-2.0", "The GNU Affero General Public License differs from the GPL in its section 13.", None),
        ("MIT", "Copyright X. All rights reserved.\nRedistribution and use in source and binary forms are", None),
        (None, "fine", None),
    ],
)
def test_licence_notices_and_declarations(declared: str | None, text: str, reason: str | None) -> None:
    assert licence(declared, text) == reason


def test_a_slur_is_found_as_a_whole_word_in_any_case() -> None:
    assert offensive("The raccoon, the spic-and-span kitchen and the gypsum in Scunthorpe.") is None
    slur = codecs.decode("gbjryurnq", "rot13")
    assert offensive(f"They called him a {slur.upper()}!") == "offensive"
    assert offensive(f"They are {slur}s.") == "offensive"
    assert offensive(f"x{slur}y") is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "  "}, "malformed:empty-instruction"),
        ({"response": "\n"}, "malformed:empty-response"),
        ({"response": "How does  a kettle work?"}, "malformed:echo"),
        ({"finish_reason": "length"}, "malformed:truncated"),
        ({"finish_reason": "stop"}, None),
        ({"response": "It \ufffd boils"}, "malformed:encoding"),
        ({"response": "It \ud800 boils"}, "malformed:encoding"),
        ({"response": "It boils<|im_end|>"}, "malformed:chat-template"),
        ({"response": "```python\nboil()"}, "malformed:open-code-fence"),
        ({"response": "```python\nboil()\n```"}, None),
    ],
)
def test_malformed_pairs(change: dict[str, Any], reason: str | None) -> None:
    assert malformed(row(**change)) == reason


@pytest.mark.parametrize("broken", [{}, {"task": None, "response": "r"}, {"task": {"prompt": 3}, "response": "r"}])
def test_rows_without_shape_are_malformed_not_a_crash(broken: dict[str, Any]) -> None:
    assert curate([broken], PLAIN, 7.0, words)[1].dropped == {"malformed:empty-instruction": 1}


# --- the whole


def test_first_reason_wins_and_the_report_adds_up() -> None:
    rows = [
        row(id="good"),
        row(id="low", total=5.0, response="Write to jane@acme.org about it, please."),
        row(id="mail", response="Write to jane@acme.org about it, please."),
        row(id="unscored") | {"quality": None},
        row(id="nan", total=float("nan")),
        row(id="short", prompt="Hi", response="Yo"),
        row(id="long", response=" ".join(map(str, range(101)))),
        row(id="edge", total=7.0),
    ]
    counted: list[str] = []

    def count(texts: list[str]) -> list[int]:
        counted.extend(texts)
        return words(texts)

    kept, report = curate(rows, FilterConfig(min_tokens=3, max_tokens=100), 7.0, count)
    assert [item["task"]["id"] for item in kept] == ["good", "edge"]
    assert kept[0]["tokens"] == 12 and "tokens" not in rows[0]
    assert report.dropped == {
        "pii:email": 1,
        "quality:5.0": 1,
        "quality:unscored": 2,
        "tokens:long": 1,
        "tokens:short": 1,
    }
    assert report.dropped_by_filter == {"pii": 1, "quality": 3, "tokens": 2}
    assert report.rows == report.kept + sum(report.dropped.values()) == 8
    assert (report.tokens_min, report.tokens_median, report.tokens_max, report.tokens_total) == (12, 12, 12, 24)
    assert report.mean_quality == 8.0
    assert len(counted) == 4  # tokens are counted only for what the cheap filters left


def test_examples_never_quote_personal_data() -> None:
    rows = [row(prompt=f"Who is jane{n}@acme.org, and why?", id=f"id{n}") for n in range(5)] + [row(total=1.0)]
    report = curate(rows, PLAIN, 7.0, words)[1]
    assert report.examples["pii:email"] == ("id0", "id1", "id2")
    assert report.examples["quality:1.0"] == ("t: How does a kettle work?",)
    assert "acme" not in repr(report)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (FilterConfig(min_tokens=9, max_tokens=8), "min_tokens 9 is above"),
        (FilterConfig(languages=("eng",)), r"unknown language 'eng'\n.*'en'"),
        (FilterConfig(languages=()), "no language is allowed"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(config: FilterConfig, problem: str) -> None:
    with pytest.raises(CogumiError, match=problem):
        curate([], config, 7.0, words)


def test_a_counter_that_loses_texts_is_refused() -> None:
    with pytest.raises(CogumiError, match="0 token counts for 1 texts"):
        curate([row()], PLAIN, 7.0, lambda texts: [])
