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
