"""MinHash against datasketch, the keep rule against a naive oracle, files against their rows."""

import functools
import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.dedup import corpus, representatives
from cogumi_dagster.lib.dedup.files import dedup_files, text_of_row
from cogumi_dagster.lib.dedup.kernels import hash32
from cogumi_dagster.lib.dedup.minhash import bands_for, jaccard, normalise, recall, shingle_set, signatures
from cogumi_dagster.lib.dedup.texts import dedup, id_hashes
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.packed import open_packed
from cogumi_dagster.lib.profile import DedupConfig

DEFAULT = DedupConfig()
SURE = DedupConfig(bands=128)
"""One row a band: a pair at 0.8 is missed with probability 0.2^128, so an exact oracle applies where every candidate is
verified (``verified``)."""

GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau"
WORDS = GREEK.split()


@functools.cache
def sets(text: str) -> set[str]:
    text = normalise(text)
    return {text[i : i + 3] for i in range(max(1, len(text) - 2))}


def naive_jaccard(left: str, right: str) -> float:
    return len(sets(left) & sets(right)) / len(sets(left) | sets(right))


def naive_keep(texts: list[str], order: list[int], threshold: float) -> set[int]:
    kept: list[int] = []
    for document in order:
        if all(naive_jaccard(texts[document], texts[other]) < threshold for other in kept):
            kept.append(document)
    return set(kept)


def variants(seed: int, count: int) -> list[str]:
    """Documents, each with a few copies that differ by some words."""
    draw = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        words = draw.choices(WORDS, k=40)
        for changes in (0, 0, 1, 2, 4, 8):
            copy = list(words)
            for _ in range(changes):
                copy[draw.randrange(40)] = draw.choice(WORDS)
            texts.append(" ".join(copy))
    return texts[:count]


# --- text to signatures


def test_normalisation_is_nfc_lower_case_and_single_spaces() -> None:
    assert normalise("  Cafe\u0301\t IS\n\nopen ") == "caf\u00e9 is open"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.integers(1, 5))
def test_shingle_sets_have_the_sizes_and_overlaps_of_python_sets(texts: list[str], size: int) -> None:
    def expected(text: str) -> set[str]:
        padded = text if len(text) >= size else text + "\0" * (size - len(text))
        return {padded[i : i + size] for i in range(len(padded) - size + 1)}

    first = shingle_set(texts[0], size)
    for text in texts:
        mine = shingle_set(text, size)
        assert len(mine) == len(expected(text))
        both, either = expected(text) & expected(texts[0]), expected(text) | expected(texts[0])
        assert jaccard(mine, first) == pytest.approx(len(both) / len(either))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=8), st.integers(1, 5))
def test_signatures_equal_datasketch_given_the_same_hashes(texts: list[str], size: int) -> None:
    config = DedupConfig(shingle=size)
    ours = signatures(texts, config)
    for number, text in enumerate(texts):
        theirs = MinHash(num_perm=128, hashfunc=int)
        theirs.update_batch([int(hash32(code)) for code in shingle_set(normalise(text), size)])
        assert theirs.scheme == "affine32"
        np.testing.assert_array_equal(ours[number], theirs.hashvalues)


def test_signatures_do_not_depend_on_the_block_a_text_falls_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 10_000)
    texts = [*variants(1, 60), "x" * 70_000, "", "ab", *variants(2, 700)]
    together = signatures(texts, DEFAULT)
    for number in (0, 59, 60, 61, 62, 63, 400, 762):
        np.testing.assert_array_equal(together[number], signatures([texts[number]], DEFAULT)[0])


def test_signature_agreement_estimates_jaccard_as_well_as_datasketch() -> None:
    texts = variants(3, 240)
    ours = signatures(texts, DEFAULT)
    sketches = []
    for text in texts:
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in sets(text)])
        sketches.append(sketch)
    pairs = [(i, j) for i in range(0, 240, 6) for j in range(i + 2, i + 6)]
    exact = np.array([naive_jaccard(texts[i], texts[j]) for i, j in pairs])
    mine = np.array([np.mean(ours[i] == ours[j]) for i, j in pairs])
    theirs = np.array([sketches[i].jaccard(sketches[j]) for i, j in pairs])
    # The standard error at 128 permutations is at most 0.044; over 160 pairs the mean error is far smaller.
    assert abs((mine - exact).mean()) < 0.02
    assert np.abs(mine - exact).mean() < 0.05
    assert np.abs(mine - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


# --- bands


@pytest.mark.parametrize(("bands", "rows", "published"), [(8, 16, 0.20), (16, 8, 0.95), (20, 6, 0.998)])
def test_recall_is_the_published_one(bands: int, rows: int, published: float) -> None:
    assert recall(0.8, bands * rows, bands) == pytest.approx(published, abs=0.005)


def test_bands_that_would_lose_pairs_are_refused_with_the_right_number() -> None:
    with pytest.raises(CogumiError, match=r"find only 20%.*\n.*bands to 17"):
        dedup(["a", "b"], DedupConfig(bands=8))
    with pytest.raises(CogumiError, match="more than 128 permutations"):
        dedup(["a", "b"], DedupConfig(bands=129))
    with pytest.raises(CogumiError, match=r"bands to \d\d"):
        dedup(["a", "b"], DedupConfig(threshold=0.6))
    dedup(["a", "b"], DedupConfig(threshold=0.6, bands=bands_for(0.6)))


def test_default_bands_find_nearly_all_pairs() -> None:
    texts = variants(5, 240)
    kept = np.flatnonzero(dedup(texts, DEFAULT.model_copy(update={"keep": "first"}))[0]).tolist()
    oracle = naive_keep(texts, list(range(240)), 0.8)
    assert len(set(kept) ^ oracle) <= 0.08 * len(oracle)


# --- the keep rule


TEXTS = st.lists(st.lists(st.sampled_from(WORDS[:6]), min_size=0, max_size=7).map(" ".join), min_size=0, max_size=14)


def verified() -> Any:
    """No candidate is left out for what its signature says: one in 10,000 at the threshold would be lost otherwise."""
    return mock.patch.object(representatives, "SIGMAS", 100.0)


@settings(deadline=None, max_examples=60)
@example(["delta", "delta delta"], 0.5, random.Random(0))
@given(TEXTS, st.sampled_from([0.5, 0.8, 0.95]), st.randoms(use_true_random=False))
def test_keep_rule_equals_the_naive_oracle(texts: list[str], threshold: float, choose: random.Random) -> None:
    size = len(texts)
    scores = [choose.choice([1.0, 2.0]) for _ in texts]
    ids = [f"{n:02}" for n in choose.sample(range(size), size)]
    for keep in ("best", "first"):
        config = SURE.model_copy(update={"threshold": threshold, "keep": keep})
        with verified():
            mask, report = dedup(texts, config, ids=ids, scores=scores)
        hashes = id_hashes(ids).tolist()
        order = sorted(range(size), key=lambda n: (-scores[n], hashes[n])) if keep == "best" else list(range(size))
        assert set(np.flatnonzero(mask)) == naive_keep(texts, order, threshold)
        assert report.kept == mask.sum() and report.kept + report.removed == size == report.documents
        assert sum(report.categories.values()) == report.removed


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_with_default_bands_every_removed_text_has_a_kept_twin_and_order_does_not_matter(
    seed: int, shuffle: random.Random
) -> None:
    texts = variants(seed, 30)
    ids = [f"id{n}" for n in range(30)]
    scores = [float(n % 3) for n in range(30)]
    mask, _ = dedup(texts, DEFAULT, ids=ids, scores=scores)
    kept = [texts[n] for n in range(30) if mask[n]]
    for number in np.flatnonzero(~mask):
        assert max(naive_jaccard(texts[number], other) for other in kept) >= 0.8
    order = list(range(30))
    shuffle.shuffle(order)
    again, _ = dedup([texts[n] for n in order], DEFAULT, ids=[ids[n] for n in order], scores=[scores[n] for n in order])
    assert {ids[n] for n in range(30) if mask[n]} == {ids[n] for n, keep in zip(order, again, strict=True) if keep}


def test_a_chain_loses_only_its_middle() -> None:
    base = "".join(chr(0x4E00 + n) for n in range(100))
    first, middle, last = base[:80], base[5:88], base[14:96]
    assert naive_jaccard(first, middle) >= 0.8 and naive_jaccard(middle, last) >= 0.8 > naive_jaccard(first, last)
    mask, report = dedup([first, middle, last], SURE.model_copy(update={"keep": "first"}))
    assert mask.tolist() == [True, False, True]
    assert report.largest_cluster == 2


# --- engines, workers, memory

LEVELS = [
    *variants(11, 300),
    "",
    "ab",
    "AB",
    "\u00c9t\u00e9 " * 30,
    "e\u0301t\u00e9 " * 30,
    "half \ud800",
    *variants(12, 300),
]
NAMES = [f"n{number}" for number in range(len(LEVELS))]


def test_the_compiled_engine_agrees_with_datasketch() -> None:
    fast, mine = dedup(LEVELS, SURE, ids=NAMES)
    slow, theirs = dedup(LEVELS, SURE.model_copy(update={"engine": "datasketch"}), ids=NAMES)
    np.testing.assert_array_equal(fast, slow)
    assert mine.categories == theirs.categories and mine.largest_cluster == theirs.largest_cluster
    assert {(pair.removed_id, pair.kept_id, pair.jaccard) for pair in mine.examples} == {
        (pair.removed_id, pair.kept_id, pair.jaccard) for pair in theirs.examples
    }


def test_workers_batches_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, report = dedup(LEVELS, DEFAULT, ids=NAMES, workers=1)
    monkeypatch.setattr(representatives, "BATCH", 37)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 999)
    for workers in (1, 3):
        mask, other = dedup(LEVELS, DEFAULT, ids=NAMES, workers=workers)
        np.testing.assert_array_equal(mask, expected)
        assert other.examples == report.examples and other.categories == report.categories


def test_a_template_that_is_half_of_the_data_costs_no_square() -> None:
    draw = random.Random(4)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(5000)]
    template = draw.choices(vocabulary, k=80)
    texts = []
    for number in range(3000):
        words = list(template) if number % 2 else draw.choices(vocabulary, k=80)
        words[draw.randrange(80)] = f"name{number}"
        texts.append(" ".join(words))
    _, report = dedup(texts, DEFAULT)
    assert report.largest_cluster > 1000
    assert report.candidates_verified < 4 * len(texts)


def test_files_larger_than_memory_go_through_the_disk(tmp_path: Path) -> None:
    rows = [{"text": text, "id": name} for text, name in zip(LEVELS, NAMES, strict=True)]
    source = write(tmp_path / "in.jsonl", *rows)
    roomy = dedup_files([source], tmp_path / "roomy.jsonl", DEFAULT)
    tight = dedup_files([source], tmp_path / "tight.jsonl", DEFAULT, memory_gb=1e-6)
    assert (tmp_path / "roomy.jsonl").read_bytes() == (tmp_path / "tight.jsonl").read_bytes()
    assert roomy.categories == tight.categories
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "roomy.jsonl", "tight.jsonl"]


def test_a_ray_cluster_keeps_the_same_lines(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from cogumi_dagster.lib.dedup.on_ray import dedup_on_ray

    rows = [{"text": text, "id": name} for text, name in zip(LEVELS, NAMES, strict=True)]
    inputs = [write(tmp_path / "a.jsonl", *rows[:350]), write(tmp_path / "b.jsonl", "{broken\n", *rows[350:])]
    by_lists, _ = dedup(LEVELS, DEFAULT.model_copy(update={"engine": "ray"}), ids=NAMES)
    np.testing.assert_array_equal(by_lists, dedup(LEVELS, DEFAULT, ids=NAMES)[0])
    here = dedup_files(inputs, tmp_path / "here.jsonl", DEFAULT)
    there = dedup_on_ray(inputs, tmp_path / "there", DEFAULT, range_bytes=20_000)
    parts = sorted((tmp_path / "there").iterdir())
    assert len(parts) > 4
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / "here.jsonl").read_bytes()
    assert there.categories == here.categories and there.removed_by_source == here.removed_by_source


# --- the report


def test_report_counts_categories_clusters_domains_and_shows_pairs() -> None:
    text = " ".join(random.Random(0).choices(WORDS, k=60))
    near = text + " q"
    texts = [text, text.upper(), f"  {text} ", near, "something else altogether, with nothing shared"]
    domains = ["math", "math", "code", "code", "code"]
    first = DEFAULT.model_copy(update={"keep": "first"})
    mask, report = dedup(texts, first, ids=list("abcde"), domains=domains, sources=["s"] * 5)
    assert mask.tolist() == [True, False, False, False, True]
    assert report.categories == {"0.95-1.0": 1, "exact": 2}
    assert report.largest_cluster == 4
    assert report.removed_by_domain == {"code": 2, "math": 1}
    assert report.removed_by_source == {"s": 3}
    assert report.candidates_verified == 1
    pair = next(example for example in report.examples if example.category == "0.95-1.0")
    assert (pair.removed_id, pair.kept_id) == ("d", "a")
    assert pair.jaccard == pytest.approx(naive_jaccard(text, near), abs=1e-4)


def test_nothing_in_nothing_out() -> None:
    mask, report = dedup([], DEFAULT)
    assert mask.shape == (0,) and report.documents == report.kept == report.largest_cluster == 0


def test_lists_of_other_lengths_are_refused() -> None:
    with pytest.raises(CogumiError, match="2 texts but 1 scores"):
        dedup(["a", "b"], DEFAULT, scores=[1.0])


# --- files


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "i", "response": "r"}, "i\nr"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\nx\no"),
        ({"prompt": "p", "completion": "c"}, "p\nc"),
        ({"question": "q", "answer": "a"}, "q\na"),
        ({"question": "q", "difficulty": "easy"}, "q"),
        ({"text": "t"}, "t"),
        ({"task": {"prompt": "p"}, "response": "r"}, "p\nr"),
        ({"label": "x"}, None),
        ({"text": 3}, None),
    ],
)
def test_text_of_the_usual_shapes(row: dict[str, object], text: str | None) -> None:
    assert text_of_row(row) == text


def test_files_keep_the_best_row_and_say_what_they_left_out(tmp_path: Path) -> None:
    text = " ".join(WORDS)
    low = {"task": {"prompt": text, "domain": "math", "id": "t1"}, "response": "r", "quality": {"total": 7.0}}
    high = {"task": {"prompt": text, "domain": "code", "id": "t2"}, "response": "r", "quality": {"total": 9.0}}
    one = write(tmp_path / "one.jsonl", low, "{broken\n", {"text": "half \ud800"}, {"no": "text"})
    two = write(tmp_path / "two.jsonl", {"text": "quite another thing"}, high)
    report = dedup_files([one, two], tmp_path / "out.jsonl", DEFAULT)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"text": "quite another thing"},
        high,
    ]
    assert report.removed_by_domain == {"math": 1}
    assert report.removed_by_source == {"one.jsonl": 1}
    assert "line 2" in report.left_out[0] and "2 row(s) without a text" in report.left_out[1]

    first = dedup_files([one, two], tmp_path / "first.jsonl", DEFAULT.model_copy(update={"keep": "first"}))
    assert first.kept == 2
    assert json.loads((tmp_path / "first.jsonl").read_text().splitlines()[0]) == low


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_packed_files_are_read_and_written(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"in.jsonl{ending}"
    with open_packed(source, "wb") as out:
        out.write(b'{"text": "one and the same"}\n{"text": "One  and the same"}\n{"text": "another"}')
    report = dedup_files([source], tmp_path / f"out.jsonl{ending}", DEFAULT)
    assert (report.kept, report.categories) == (2, {"exact": 1})
    with open_packed(tmp_path / f"out.jsonl{ending}") as lines:
        assert len(lines.readlines()) == 2


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_that_was_cut_off_is_refused_and_the_output_stays(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"in.jsonl{ending}"
    with open_packed(source, "wb") as out:
        for text in variants(7, 400):
            out.write(json.dumps({"text": text}).encode() + b"\n")
    source.write_bytes(source.read_bytes()[:-200])
    (tmp_path / "out.jsonl").write_text("kept from before")
    with pytest.raises(CogumiError, match="cannot be read"):
        dedup_files([source], tmp_path / "out.jsonl", DEFAULT)
    assert (tmp_path / "out.jsonl").read_text() == "kept from before"


def test_an_input_is_never_overwritten_and_a_file_without_text_is_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"text": "t"})
    before = one.read_bytes()
    with pytest.raises(CogumiError, match="both an input and the output"):
        dedup_files([one], tmp_path / "." / "one.jsonl", DEFAULT)
    assert one.read_bytes() == before
    odd = write(tmp_path / "odd.jsonl", {"utterance": "t"})
    with pytest.raises(CogumiError, match=r"odd\.jsonl: no row has a text; its fields are utterance"):
        dedup_files([one, odd], tmp_path / "out.jsonl", DEFAULT)
    assert not (tmp_path / "out.jsonl").exists()
