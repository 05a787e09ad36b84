import base64

from cogumi_dagster.defs.metadata import metadata_of


def test_a_frontier_is_shown_as_plot_and_as_table() -> None:
    rows = [
        {"type": "Q4_0", "bytes": 91_700_000, "perplexity_ratio": 1.10, "fallbacks": "Q6_K as Q8_0"},
        {"type": "mixed", "bytes": 91_600_000, "perplexity_ratio": 1.04, "fallbacks": ""},
    ]
    shown = metadata_of({"rows": rows, "perplexity_tokens": 2048})
    assert "| Q4_0 | 91,700,000 | 1.1 | Q6_K as Q8_0 |" in shown["rows"].value
    plot = base64.b64decode(shown["frontier"].value.partition("base64,")[2].rstrip(")")).decode()
    assert "made to the budget" in plot and ">mixed<" in plot and "perplexity / parent" in plot
    assert set(metadata_of({"rows": [{"asset": "a", "bytes": 1}]})) == {"rows"}


def test_shares_stand_in_tables_with_their_count_and_interval() -> None:
    share = {"successes": 3, "count": 4, "value": 0.75, "low": 0.3, "high": 0.954}
    family = {"family": "sums", "recalls": {"NO": share}, "sets": [share, share], "missed": [], "p": None}
    shown = metadata_of({"families": [family] * 21, "noise": {"seeds": 2, "repaired": share}, "deep": {"a": {"b": 1}}})
    header, _, row, *_, last = shown["families"].value.splitlines()
    assert header == "| family | recalls | sets | missed | p |", "the order of the report"
    text = "0.750 (3 of 4; 95 %: 0.300 to 0.954)"
    assert row == f"| sums | NO {text} | {text}; {text} |  | – |" and last == "| and 1 more | | | | |"
    assert f"| repaired | {text} |" in shown["noise"].value
    assert shown["deep"].value == {"a": {"b": 1}}
