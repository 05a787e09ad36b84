"""Benchmark questions in the training data, verbatim, wrapped, nearly, and what only looks like them."""

from typing import Any

import pytest

from cogumi_dagster.lib.curation.decontamination import decontaminate

LONG = (
    "A baker makes twelve loaves every morning, sells nine of them before noon and gives the rest to her neighbours;"
    " how many loaves do the neighbours get in a week?"
)
SHORT = "Name the largest planet that orbits our Sun today"
TINY = "What is entropy?"
OTHER = "Describe how a suspension bridge carries the weight of the traffic that crosses it during a storm."


def row(prompt: str, response: str = "An answer.", identity: str = "x") -> dict[str, Any]:
    return {"task": {"id": identity, "prompt": prompt}, "response": response}


def removed(rows: list[dict[str, Any]], *prompts: str) -> list[tuple[str, str]]:
    kept, report = decontaminate(rows, {"bench": prompts})
    assert len(kept) + report.removed == len(rows) == report.rows
    return [(item.id, item.rule) for item in report.contaminated]


@pytest.mark.parametrize(
    ("instruction", "response", "rule"),
    [
        (LONG, "21", "near-duplicate"),
        (LONG.upper().replace(",", " ,"), "21", "near-duplicate"),
        (LONG.replace("twelve", "eleven"), "14", "near-duplicate"),
        (
            f"Read this with care and think. {LONG} Show each step, then check it and say how sure you are.",
            "21",
            "words",
        ),
        (
            "Invent a question like those of the test and solve it for me, please.",
            f"Question: {LONG} It is 21.",
            "words",
        ),
        ("Who sells nine of them before noon and gives the rest to her neighbours today, and why?", "She.", "words"),
    ],
)
def test_a_long_prompt_is_found_whole_in_part_and_nearly(instruction: str, response: str, rule: str) -> None:
    assert removed([row(instruction, response), row(OTHER)], LONG) == [("x", rule)]


def test_twelve_shared_words_are_not_enough() -> None:
    # "sells nine of them before noon and gives the rest to her" is 12 words; 13 with "neighbours".
    asked = "Who sells nine of them before noon and gives the rest to her friends, and what for?"
    assert removed([row(asked)], LONG) == []
    assert removed([row(asked.replace("friends", "neighbours"))], LONG) == [("x", "words")]


def test_words_do_not_run_from_the_instruction_into_the_response() -> None:
    words = LONG.split()
    assert removed([row("Complete: " + " ".join(words[:10]), " ".join(words[10:20]))], LONG) == []


def test_short_prompts_match_whole_and_tiny_ones_only_as_the_instruction() -> None:
    rows = [
        row(
            f"Please do this for my homework in astronomy: {SHORT.lower()}, and give its mass and radius too.",
            identity="a",
        ),
        row(
            "Name the largest planet that orbits another star far from here and explain how it was found.", identity="b"
        ),
        row("what is ENTROPY", identity="c"),
        row("What is entropy? And what has it to do with the arrow of time and with information theory?", identity="d"),
    ]
    assert [name for name, _ in removed(rows, SHORT, TINY)] == ["a", "c"]


def test_a_template_in_more_than_ten_rows_is_ignored_but_a_whole_prompt_never() -> None:
    template = "You are given a list of the typed functions below, answer with exactly one call as JSON:"
    benchmark = f"{template} book the blue room for Ada at nine on Monday, and invite the entire team by mail to join"

    def task(number: int) -> dict[str, Any]:
        return row(
            f"{template} request {number}: move file f{number} to folder g{number}, then list what is in it",
            "{}",
            str(number),
        )

    assert len(removed([task(n) for n in range(10)], benchmark)) == 10
    rows = [task(n) for n in range(11)]
    kept, report = decontaminate(rows, {"bench": [benchmark]})
    assert report.removed == 0 and len(kept) == 11
    assert " ".join(template.lower().replace(",", "").replace(":", "").split()[:13]) in report.common_phrases
    leaks = [
        row(f"Task {n} of the list that we made on that day. {benchmark}. " + OTHER, identity=f"leak{n}")
        for n in range(12)
    ]
    assert {name for name, _ in removed([*rows, *leaks], benchmark)} == {f"leak{n}" for n in range(12)}


def test_common_phrases_of_the_whole_hold_for_a_part() -> None:
    template = "Say in at most three words which of the following colours the described object most probably has"
    rows = [row(f"{template}: thing {n} of heap {n * 7}", identity=str(n)) for n in range(20)]
    prompts = {"bench": [f"{template}: an overripe banana, left for weeks behind the old cupboard of my grandmother"]}
    phrases = decontaminate(rows, prompts)[1].common_phrases
    assert phrases
    assert decontaminate(rows[:4], prompts)[1].removed == 4
    assert decontaminate(rows[:4], prompts, phrases)[1].removed == 0


def test_the_report_names_benchmark_rule_and_both_texts() -> None:
    kept, report = decontaminate(
        [row(LONG, identity="leak"), row(OTHER, identity="fine")], {"sums": [LONG], "facts": [SHORT, TINY]}
    )
    assert [item["task"]["id"] for item in kept] == ["fine"]
    assert report.benchmark_prompts == {"facts": 2, "sums": 1}
    assert report.by_benchmark == {"sums": 1} and report.by_rule == {"near-duplicate": 1}
    (leak,) = report.contaminated
    assert (leak.id, leak.benchmark, leak.similarity) == ("leak", "sums", 1.0)
    assert LONG.startswith(leak.instruction) and LONG.startswith(leak.benchmark_prompt)


def test_records_of_the_dataset_are_read_as_well_and_nothing_is_no_problem() -> None:
    records = [{"instruction": LONG, "response": "21", "metadata": {}}]
    assert decontaminate(records, {"bench": [LONG]})[1].removed == 1
    assert decontaminate(records, {})[0] == records
    assert decontaminate([], {"bench": [LONG]})[1].rows == 0
    assert decontaminate(records, {"bench": ["", "?!"]})[1].removed == 0
