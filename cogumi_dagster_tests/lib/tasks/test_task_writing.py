"""Constraints on writing: each rule holds for a text that keeps it and not for one that does not."""

from collections import Counter

import pytest

from cogumi_dagster.lib.tasks.base import DIFFICULTIES, Task
from cogumi_dagster.lib.tasks.writing import CONSTRAINTS, CONVERSATION, CREATIVE, RULES, read_seeds, sentences_in

KEPT_AND_BROKEN = [
    ("sentences", 2, "One is here. Two!", "One is here."),
    ("sentences", 2, 'He said "Stop." Then Mr. Hill paid 3.5 euros.', "One. Two. Three"),
    ("bullets", 3, "- a\n- b\n* c", "- a\n- b"),
    ("at_most_words", 3, "one two three", "one two three four"),
    ("at_least_words", 3, "one two don't", "one two"),
    ("include", "river", "The River runs.", "The rivers run."),
    ("avoid", "good", "goodness me", "It is good."),
    ("start", "Once", '"Once upon a time', "At once"),
    ("end_question", True, 'Is it so?"', "Is it so? Yes."),
    ("end_exclamation", True, "Stop!", "Stop."),
    ("lowercase", True, "all small.", "All small."),
]


@pytest.mark.parametrize(("kind", "value", "kept", "broken"), KEPT_AND_BROKEN)
def test_rules(kind: str, value: object, kept: str, broken: str) -> None:
    assert RULES[kind].holds(kept, value)
    assert not RULES[kind].holds(broken, value)


def test_all_rules_are_tested() -> None:
    assert {row[0] for row in KEPT_AND_BROKEN} == set(RULES)


def test_score_is_the_share_kept() -> None:
    constraints = [{"kind": "include", "value": "tea"}, {"kind": "end_question", "value": True}]
    task = Task("creative", "creative_guided", "medium", "p", payload={"constraints": constraints})
    verdict = CREATIVE.verify(task, "Some tea.")
    assert (verdict.passed, verdict.score) == (False, 0.5)
    assert "question mark" in verdict.reason
    assert CREATIVE.verify(task, "Some tea?").passed is True


@pytest.mark.parametrize("family", [CONVERSATION, CREATIVE], ids=lambda one: one.name)
def test_seeds_and_constraints(family) -> None:  # type: ignore[no-untyped-def]
    seeds = read_seeds(family.domain)
    assert len({row["instruction"] for row in seeds}) == len(seeds) >= 60
    assert set(Counter(row["difficulty"] for row in seeds)) == set(DIFFICULTIES)
    for difficulty in DIFFICULTIES:
        for task in family.generate(30, 0, difficulty):
            kinds = [one["kind"] for one in task.payload["constraints"]]
            assert len(kinds) == CONSTRAINTS[difficulty] and task.solution is None
            groups = [RULES[kind].group for kind in kinds]
            assert len(set(groups)) == len(groups)
            assert not {"case", "start"} <= set(groups)


def test_unfinished_sentence_counts() -> None:
    assert sentences_in("Done. And then") == 2
    assert sentences_in("") == 0
