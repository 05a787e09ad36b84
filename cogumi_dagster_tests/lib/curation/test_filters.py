"""Each filter by what it must drop and what it must not."""

import codecs
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.curation.copies import copied_share, copies, longest_quotation
from cogumi_dagster.lib.curation.filters import curate, malformed
from cogumi_dagster.lib.curation.language import foreign_language, foreign_languages
from cogumi_dagster.lib.curation.licences import licence
from cogumi_dagster.lib.curation.offence import offensive
from cogumi_dagster.lib.curation.pii import pii
from cogumi_dagster.lib.curation.repetition import repetition
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.profile import FilterConfig, read_profile

SAMPLES = Path(__file__).parents[3] / "bench" / "language_samples.jsonl"

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
        ("NINO AB 12 34 56 C on the form", "pii:national-id"),
        ("mi DNI es 45872103Y", "pii:national-id"),
        ("NIE X4829374H, gracias", "pii:national-id"),
        ("numéro 2 84 05 75 115 423 54", "pii:national-id"),
        ("codice RSSMRA85T10A562S", "pii:national-id"),
        ("meu CPF: 231.002.999-81", "pii:national-id"),
        ("身份证号 11010519491231002X", "pii:national-id"),
        ("PESEL 44051401359", "pii:national-id"),
        ("my Aadhaar is 2341 2341 2346", "pii:national-id"),
        ("pay to FR76 3000 6000 0112 3456 7890 189", "pii:account"),
        ("the host is 93.184.216.34:8080", "pii:ipv4"),
        ("ping 2606:2800:220:1:248:1893:25c8:1946", "pii:ipv6"),
        ("sk_live_4eC39HqLyjWDarjtT1zdp7dc", "pii:key"),
        ("gsk_" + "a8Jd92kLmQ0pZx7Vb3Nt6Rw1" * 2, "pii:key"),
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
        "44051401359 and 2341 2341 2346 are numbers like others",
        "the DNI 12345678Z and the IBAN DE89 3704 0044 0532 0130 00 are the textbooks' examples; 45872103G is wrong",
        "std::vector a::b, 2001:db8::1, fe80::1, 12:30:45, 00:1a:2b:3c:4d:5e, dead::beef",
        "Order AB123456 and part RX 12 34 56 Q",
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


def test_five_languages_are_found_with_and_without_code() -> None:
    """Recall is measured by bench/filters.py; here each language keeps what it has."""
    samples = read_jsonl(SAMPLES)
    texts = [sample["text"] for sample in samples] + [f"{sample['text']}\n```\nx = 1\n```" for sample in samples]
    codes = foreign_languages(texts, ("en",))
    named = [code == sample["language"] for code, sample in zip(codes, samples * 2, strict=True)]
    assert len(samples) == 50 and sum(named) >= 95
    assert foreign_languages(texts, ("de", "en", "es", "fr", "ru", "zh")) == [None] * 100


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


def test_a_restrictive_licence_can_be_accepted_by_name() -> None:
    assert licence("CC-BY-NC-4.0", "fine", ("CC-BY-NC-4.0",)) is None
    assert licence("CC-BY-NC-SA-4.0", "fine", ("CC-BY-NC-4.0",)) == "licence:declared-nc"
    rows = [row(licence="CC-BY-NC-4.0")]
    assert curate(rows, PLAIN, 7.0, words)[1].dropped == {"licence:declared-nc": 1}
    assert curate(rows, PLAIN.model_copy(update={"licences": ("CC-BY-NC-4.0",)}), 7.0, words)[1].kept == 1


# --- copies

PASSAGE = " ".join(f"word{n} and{n % 7}" for n in range(60))


def test_a_response_that_gives_the_instruction_back_is_dropped() -> None:
    assert copies(f"Summarize: {PASSAGE}", f"Sure! {PASSAGE}") == "copy:instruction"
    assert copied_share(PASSAGE, PASSAGE) == 1.0
    half = PASSAGE[: len(PASSAGE) // 2] + " " + " ".join(f"other{n}" for n in range(60))
    assert copies(f"Go on with this: {PASSAGE}", half) is None and 0.4 < copied_share(PASSAGE, half) < 0.6
    edited = PASSAGE.replace("word1", "verb1").replace("word3", "verb3").replace("word5", "verb5")
    assert copies(f"Correct: {PASSAGE}", edited) is None, "corrected in many places"
    assert copies("Say it: how does a kettle work", "how does a kettle work") is None, "too short to be a copy"


MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy
# of this software, subject to the following conditions: the above copyright notice shall be included.
# IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM."""


def test_licence_texts_are_found_through_comment_marks_and_their_names_are_not() -> None:
    assert copies("Write a header", f"# {MIT}") == "copy:licence-mit"
    said = "The MIT licence begins: Permission is hereby granted, free of charge, to any person. It is short."
    assert copies("What is the MIT licence?", said) is None


def test_a_quoted_page_is_found_and_dialogue_or_a_text_wholly_in_quotes_is_not() -> None:
    page = " ".join(f"sentence{n}" for n in range(120))
    around = "It begins like this, and I give it in full for you to read at leisure, with all that belongs to it."
    for quoted in (f'"{page}"', f"“{page}”", "\n> " + page.replace(" sentence60 ", "\n> sentence60 ") + "\n"):
        assert copies("Quote it.", f"{around * 2} {quoted} {around}") == "copy:quotation"
    assert longest_quotation(f'"{page}"') == 0
    assert longest_quotation(f"{around} ```\nx = '{page}' + \"{page}\"\n``` {around}") == 0
    dialogue = '"Who is there?" she asked, and waited by the door. ' * 20
    assert longest_quotation(dialogue + around) < 20


def test_a_slur_is_found_as_a_whole_word_in_any_case() -> None:
    assert offensive("The raccoon, the spic-and-span kitchen and the gypsum in Scunthorpe.") is None
    slur = codecs.decode("gbjryurnq", "rot13")
    assert offensive(f"They called him a {slur.upper()}!") == "offensive:slur"
    assert offensive(f"They are {slur}s.") == "offensive:slur"
    assert offensive(f"x{slur}y") is None
    assert offensive(codecs.decode("lbh ner n shpxvat yvne", "rot13")) == "offensive:obscene"
    assert offensive("Go and kill yourself.") == "offensive:threat"
    assert offensive("To kill a process use kill -9; the cocktail and Dick Tracy are fine with you.") is None


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


def test_processes_change_nothing() -> None:
    rows = [
        row(f"Question {n}?", (FRENCH, "Mail jane@acme.org, please.", "It is so. " * 40, f"Because of {n}.")[n % 4])
        for n in range(4500)
    ] + [{}]
    assert curate(rows, PLAIN, 7.0, words, workers=2) == curate(rows, PLAIN, 7.0, words, workers=1)


@pytest.mark.parametrize("name", ["gpu", "cluster"])
def test_full_size_profiles_have_the_specification_s_bounds(name: str) -> None:
    filters = read_profile(name).dataset.filters
    assert (filters.min_tokens, filters.max_tokens) == (150, 2048)


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
