"""Failures grouped into patterns: sentence embeddings, KMeans, a name from each cluster's own words."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import write_jsonl

Embed = Callable[[Sequence[str]], Any]
"""texts -> (n, dimensions) float array."""

CENTRE_EXAMPLES = 3


@dataclass(frozen=True)
class Pattern:
    cluster: int
    name: str
    size: int
    words: tuple[str, ...]
    families: str
    centre_examples: tuple[str, ...]
    """The failures nearest its centre: the prompt, and what was wrong with the answer."""


@dataclass(frozen=True)
class PatternsReport:
    """``silhouettes`` by k, of which the best was taken; ``points`` are the first two principal components."""

    failures: int
    clusters: int
    silhouette: float
    silhouettes: dict[str, float]
    smallest: int
    largest: int
    patterns: tuple[Pattern, ...]
    points: tuple[tuple[float, float, int], ...]


def find_patterns(
    failures: Sequence[dict[str, Any]], embed: Embed, out: Path, *, clusters: tuple[int, int], seed: int
) -> PatternsReport:
    """Cluster the prompts with each k in ``clusters`` (inclusive), keep the best silhouette, write assignments.jsonl.

    Raises:
        CogumiError: not more failures than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import silhouette_score

    low, high = clusters
    if len(failures) <= low:
        raise CogumiError(
            f"{len(failures)} failures cannot make {low} clusters", "raise modifiers.training_tasks, or lower clusters"
        )
    texts = [row["task"]["prompt"] for row in failures]
    vectors = embed(texts)
    tried: dict[int, tuple[float, Any]] = {}
    for k in range(low, min(high, len(failures) - 1) + 1):
        model = KMeans(k, n_init=10, random_state=seed).fit(vectors)
        distinct = len(set(model.labels_))
        tried[k] = (float(silhouette_score(vectors, model.labels_)) if distinct > 1 else -1.0, model)
    best = max(tried, key=lambda k: tried[k][0])
    silhouette, model = tried[best]
    vectorizer = TfidfVectorizer(stop_words="english", token_pattern=r"[A-Za-z_]{3,}", max_features=2000)
    weights, words = vectorizer.fit_transform(texts), vectorizer.get_feature_names_out()
    patterns = []
    for cluster in range(best):
        members = [i for i, label in enumerate(model.labels_) if label == cluster]
        if not members:
            continue
        mean = weights[members].mean(axis=0).A1
        top = tuple(str(words[i]) for i in mean.argsort()[::-1][:5])
        nearest = sorted(members, key=lambda i: float(((vectors[i] - model.cluster_centers_[cluster]) ** 2).sum()))
        examples = tuple(f"{_ends(texts[i])} [{_ends(failures[i]['reason'])}]" for i in nearest[:CENTRE_EXAMPLES])
        families = Counter(failures[i]["task"]["family"] for i in members)
        name = f"{families.most_common(1)[0][0]}: {' '.join(top[:2])}"
        shown = ", ".join(f"{family} {count}" for family, count in families.most_common(3))
        patterns.append(Pattern(cluster, name, len(members), top, shown, examples))
    write_jsonl(
        out / "assignments.jsonl",
        (
            {"task_id": row["task"]["id"], "cluster": int(label)}
            for row, label in zip(failures, model.labels_, strict=True)
        ),
    )
    flat = PCA(2, random_state=seed).fit_transform(vectors)
    return PatternsReport(
        failures=len(failures),
        clusters=len(patterns),
        silhouette=silhouette,
        silhouettes={str(k): value for k, (value, _) in tried.items()},
        smallest=min(pattern.size for pattern in patterns),
        largest=max(pattern.size for pattern in patterns),
        patterns=tuple(patterns),
        points=tuple((float(x), float(y), int(label)) for (x, y), label in zip(flat, model.labels_, strict=True)),
    )


def _ends(text: str) -> str:
    """How it begins and how it ends: of a long prompt the question is at its end."""
    return text if len(text) <= 240 else f"{text[:90]} … {text[-140:]}"
