"""Requests for one Python expression: the words, the expression, the inputs and the steps to its value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from cogumi_dagster.lib.tasks.base import Difficulty

_WORDS = (
    "apple", "sky", "river", "moon", "tea", "garden", "ox", "lamp", "music", "snow", "ant", "cloud", "bread", "ink",
)  # fmt: skip
_LETTERS = "aeiorst"


@dataclass(frozen=True)
class Request:
    """``words`` and ``expression`` are templates over the parameters n, m, k and c; ``steps`` over the same, evaluated
    on the input and shown one a line."""

    words: str
    expression: str
    variable: str
    steps: tuple[str, ...] = ()


def _numbers(rng: Random, difficulty: Difficulty) -> list[int]:
    size = {"easy": (3, 4), "medium": (4, 6), "hard": (5, 7)}[difficulty]
    return [rng.randint(0, 20) for _ in range(rng.randint(*size))]


def _words(rng: Random, difficulty: Difficulty) -> list[str]:
    size = {"easy": 3, "medium": 4, "hard": 5}[difficulty]
    return rng.sample(_WORDS, size)


def _text(rng: Random, difficulty: Difficulty) -> str:
    return " ".join(_words(rng, difficulty)[:3])


def _prices(rng: Random, difficulty: Difficulty) -> dict[str, int]:
    return {word: rng.randint(1, 20) for word in _words(rng, difficulty)}


INPUTS: Mapping[str, Callable[[Random, Difficulty], Any]] = {
    "xs": _numbers, "words": _words, "text": _text, "prices": _prices,
}  # fmt: skip

_SUMS = "[sum(xs[: i + 1]) for i in range(len(xs))]"
"""The sum so far behind each number."""

REQUESTS: Mapping[Difficulty, tuple[Request, ...]] = {
    "easy": (
        Request("the sum of the list xs", "sum(xs)", "xs", (_SUMS,)),
        Request("the largest number of the list xs plus {n}", "max(xs) + {n}", "xs", ("max(xs)",)),
        Request("the smallest number of the list xs minus {n}", "min(xs) - {n}", "xs", ("min(xs)",)),
        Request("the number of items of the list xs times {n}", "len(xs) * {n}", "xs", ("len(xs)",)),
        Request("the list xs in ascending order", "sorted(xs)", "xs"),
        Request("the list xs in reverse order", "xs[::-1]", "xs"),
        Request("the first {k} items of the list xs", "xs[:{k}]", "xs"),
        Request("the last {k} items of the list xs", "xs[-{k}:]", "xs"),
        Request("the list xs with {n} added at the end", "xs + [{n}]", "xs"),
        Request("the first word of the list words in capital letters", "words[0].upper()", "words", ("words[0]",)),
        Request("the number of times {c!r} appears in text", "text.count({c!r})", "text",
                ("[w.count({c!r}) for w in text.split()]",)),
        Request("whether {n} is in the list xs", "{n} in xs", "xs"),
        Request("the list of the words in text", "text.split()", "text"),
        Request("the words joined with {c!r} in between", "{c!r}.join(words)", "words"),
        Request("the list xs without its first {k} items", "xs[{k}:]", "xs"),
        Request("the list xs with {n} in front", "[{n}] + xs", "xs"),
        Request("the list of the words with {c!r} added at the end", "words + [{c!r}]", "words"),
        Request("whether the list xs has more than {k} items", "len(xs) > {k}", "xs", ("len(xs)",)),
    ),
    "medium": (
        Request("the list of the squares of the numbers in xs", "[x ** 2 for x in xs]", "xs"),
        Request("the list of the numbers in xs, each times {n}", "[x * {n} for x in xs]", "xs"),
        Request("the list of the even numbers in xs", "[x for x in xs if x % 2 == 0]", "xs", ("[x % 2 for x in xs]",)),
        Request("the list of the numbers in xs greater than {n}", "[x for x in xs if x > {n}]", "xs",
                ("[x > {n} for x in xs]",)),
        Request("how many numbers in xs are less than {n}", "len([x for x in xs if x < {n}])", "xs",
                ("[x for x in xs if x < {n}]",)),
        Request("the list of the lengths of the words", "[len(w) for w in words]", "words"),
        Request("the list of the words that contain {c!r}", "[w for w in words if {c!r} in w]", "words"),
        Request("the longest length among the words", "max(len(w) for w in words)", "words",
                ("[len(w) for w in words]",)),
        Request("the list of the words in capital letters", "[w.upper() for w in words]", "words"),
        Request("the sorted list of the words", "sorted(words)", "words"),
        Request("the sum of the values of the dict prices", "sum(prices.values())", "prices",
                ("list(prices.values())", "[sum(list(prices.values())[: i + 1]) for i in range(len(prices))]")),
        Request("the list of the keys of the dict prices in alphabetical order", "sorted(prices)", "prices",
                ("list(prices)",)),
        Request("the difference between the largest and the smallest number in xs", "max(xs) - min(xs)", "xs",
                ("max(xs)", "min(xs)")),
        Request("the list of the items of xs whose index is divisible by {k}", "xs[::{k}]", "xs"),
        Request("text without the letter {c!r}", "text.replace({c!r}, '')", "text"),
        Request("the list of the words with {c!r} put in front of each", "[{c!r} + w for w in words]", "words"),
        Request("the list of the words with more than {m} letters", "[w for w in words if len(w) > {m}]", "words",
                ("[len(w) for w in words]",)),
        Request("the list of the numbers in xs, each plus {n}", "[x + {n} for x in xs]", "xs"),
        Request("whether {n} is a value of the dict prices", "{n} in prices.values()", "prices",
                ("list(prices.values())",)),
        Request("the number of values of prices that are at least {n}", "sum(v >= {n} for v in prices.values())",
                "prices", ("[v >= {n} for v in prices.values()]",)),
    ),
    "hard": (
        Request("the sum of the squares of the even numbers in xs", "sum(x ** 2 for x in xs if x % 2 == 0)", "xs",
                ("[x for x in xs if x % 2 == 0]", "[x ** 2 for x in xs if x % 2 == 0]")),
        Request("the list of the numbers in xs greater than {n}, each times {k}", "[x * {k} for x in xs if x > {n}]",
                "xs", ("[x for x in xs if x > {n}]",)),
        Request("the dict from each word to how often {c!r} is in it", "{{w: w.count({c!r}) for w in words}}", "words"),
        Request("the list of the keys of prices whose value is less than {n}",
                "[k for k, v in prices.items() if v < {n}]", "prices", ("[v < {n} for v in prices.values()]",)),
        Request("the {k} largest numbers in xs, the largest first", "sorted(xs, reverse=True)[:{k}]", "xs",
                ("sorted(xs, reverse=True)",)),
        Request("the list of the numbers in xs greater than {n}, in descending order",
                "sorted([x for x in xs if x > {n}], reverse=True)", "xs", ("[x for x in xs if x > {n}]",)),
        Request("the dict from each word to its length", "{{w: len(w) for w in words}}", "words"),
        Request("the list of the words, shortest first, with ties in alphabetical order",
                "sorted(words, key=lambda w: (len(w), w))", "words", ("[(len(w), w) for w in words]",)),
        Request("the dict of the items of prices that cost more than {n}",
                "{{k: v for k, v in prices.items() if v > {n}}}", "prices", ("[v > {n} for v in prices.values()]",)),
        Request("the key of the largest value in prices (the first such key)", "max(prices, key=prices.get)", "prices",
                ("max(prices.values())",)),
        Request("the list of pairs (index, number) for the numbers in xs greater than {n}",
                "[(i, x) for i, x in enumerate(xs) if x > {n}]", "xs", ("list(enumerate(xs))",)),
        Request("the list of the differences between neighbours in xs (second minus first and so on)",
                "[b - a for a, b in zip(xs, xs[1:])]", "xs", ("list(zip(xs, xs[1:]))",)),
        Request("the list of the distinct numbers in xs in ascending order", "sorted(set(xs))", "xs"),
        Request("the words of text in reverse order, joined with spaces", "' '.join(text.split()[::-1])", "text",
                ("text.split()", "text.split()[::-1]")),
        Request("the list of the first letters of the words in text", "[w[0] for w in text.split()]", "text",
                ("text.split()",)),
        Request("whether all numbers in xs are at least {k}", "all(x >= {k} for x in xs)", "xs",
                ("[x >= {k} for x in xs]",)),
    ),
}  # fmt: skip


def draw_request(rng: Random, difficulty: Difficulty, inputs: int) -> tuple[Request, dict[str, Any], list[Any]]:
    """A request, its parameters, and that many inputs."""
    request = rng.choice(REQUESTS[difficulty])
    parameters = {"n": rng.randint(2, 30), "m": rng.randint(2, 5), "k": rng.randint(2, 4), "c": rng.choice(_LETTERS)}
    return request, parameters, [INPUTS[request.variable](rng, difficulty) for _ in range(inputs)]


def value_of(expression: str, variable: str, given: Any) -> Any:
    """The value of one of our own expressions (never a model's)."""
    return eval(compile(expression, "<request>", "eval"), {variable: given})


def steps_of(request: Request, parameters: Mapping[str, Any], given: Any) -> str:
    """The worked steps: intermediate values, then the value of the whole."""
    templates = (*request.steps, request.expression)
    expressions = [template.format(**parameters) for template in templates]
    return "\n".join(f"{one} = {value_of(one, request.variable, given)!r}" for one in expressions)
