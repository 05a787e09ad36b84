"""What a trained student saves: it is trained once and then answers at the machine's price; a teacher bills tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class TeacherCost:
    """One teacher."""

    teacher: str
    usd_per_answer: float
    """At list price for the same prompt and an answer as long as the student's, what it thinks besides not counted; or
    what the teacher of the strategy took for the same problems. A local teacher's time is not billed, and it has no
    row."""
    break_even: int | None
    """Answers after which teaching and training have paid for themselves. None where the teacher's is the cheaper."""


@dataclass(frozen=True)
class Economics:
    """Costs of one family. The machine costs its time at ``machine_usd_per_hour``, which the profile assumes."""

    machine_usd_per_hour: float
    training_seconds: float
    training_usd: float
    teaching_usd: float
    """What the journal and the traces cost; nothing where the solver wrote them."""
    prompt_tokens: float
    answer_tokens: float
    """Means over the answers of the trained student."""
    seconds_per_answer: float
    """Of the whole machine: the time of all answers, as many at once as there are slots, over their number."""
    usd_per_answer: float
    teachers: tuple[TeacherCost, ...]


def economics(
    *,
    training_seconds: float,
    teaching_usd: float = 0.0,
    seconds_per_answer: float,
    prompt_tokens: float,
    answer_tokens: float,
    machine_usd_per_hour: float,
    prices: Mapping[str, tuple[float, float]],
    measured: Mapping[str, float] | None = None,
) -> Economics:
    """``prices``: dollars per million tokens of prompt and of answer, by teacher; ``measured``: as paid, an answer."""
    training, own = (seconds / 3600 * machine_usd_per_hour for seconds in (training_seconds, seconds_per_answer))
    listed = {
        name: (prompt_tokens * prompt_price + answer_tokens * answer_price) / 1e6
        for name, (prompt_price, answer_price) in sorted(prices.items())
    }
    teachers = [
        TeacherCost(name, each, ceil((training + teaching_usd) / (each - own)) if each > own else None)
        for name, each in {**(measured or {}), **listed}.items()
    ]
    return Economics(
        machine_usd_per_hour, training_seconds, training, teaching_usd, prompt_tokens, answer_tokens,
        seconds_per_answer, own, tuple(teachers),
    )  # fmt: skip
