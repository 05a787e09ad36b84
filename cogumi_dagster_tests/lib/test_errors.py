from cogumi_dagster.lib.errors import CogumiError, nearest


def test_the_message_holds_problem_and_mend() -> None:
    error = CogumiError(" it broke ", " mend it ")
    assert str(error) == "it broke\n  mend: mend it"
    assert not error.retryable
    assert str(CogumiError("it broke")) == "it broke"


def test_nearest_names_the_likely_word_or_all_of_them() -> None:
    assert nearest("quik", ["local", "quick"]) == "did you mean 'quick'?"
    assert nearest("zzz", ["local", "quick"]) == "known: local, quick"
    assert nearest("zzz", []) == "known: none"
