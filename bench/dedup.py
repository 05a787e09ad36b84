"""Near-duplicate removal: ours against datasketch and rensa, its recall and precision, 750,000 examples, and growth.

    python bench/dedup.py engines [FILE.jsonl ...] [--documents 3000]
    python bench/dedup.py recall  [FILE.jsonl ...] [--documents 4000]
    python bench/dedup.py full    [--documents 750000] [--gigabytes 2.3] [--templated] [--folder DIR
    python bench/dedup.py growth  [--templated]

Without files the text is real too: the sources and documentation of the Python packages installed here. `full` builds
its file from them: paragraphs recombined, every fifth example a near-duplicate of an earlier one; with --templated half
of all examples are one template with a few words changed. --json FILE writes the figures.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.dedup.corpus import cores, read_corpus
from cogumi_dagster.lib.dedup.files import dedup_files, text_of_row
from cogumi_dagster.lib.dedup.minhash import jaccard, normalise, shingle_set
from cogumi_dagster.lib.dedup.texts import dedup
from cogumi_dagster.lib.jsonl import read_jsonl_tolerant
from cogumi_dagster.lib.profile import DedupConfig

CONFIG = DedupConfig()
Row = dict[str, Any]


# --- text


def installed_text(megabytes: float) -> str:
    """Sources and documentation of the installed packages, in a fixed order."""
    parts: list[str] = []
    size = 0
    roots = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))]
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".md", ".rst", ".txt") and path.is_file() and path.stat().st_size > 2000:
                parts.append(path.read_text(encoding="utf-8", errors="ignore"))
                size += len(parts[-1])
                if size > megabytes * 1e6:
                    return "\n".join(parts)
    return "\n".join(parts)


def real_texts(files: Sequence[Path], documents: int, length: int = 2000) -> list[str]:
    """Texts of the files' rows, or pieces of the installed packages' text; distinct, in a shuffled order."""
    if files:
        rows = [row for path in files for row in read_jsonl_tolerant(path)[0]]
        texts = [text for row in rows if (text := text_of_row(row))]
    else:
        text = installed_text(documents * length * 4 / 1e6)
        texts = [text[start : start + length] for start in range(0, len(text) - length, length)]
    texts = list(dict.fromkeys(map(normalise, texts)))
    random.Random(0).shuffle(texts)
    return texts[:documents]


def changed(text: str, draw: random.Random, words: int) -> str:
    """The text with some words replaced by others of its own."""
    parts = text.split(" ")
    for _ in range(words):
        parts[draw.randrange(len(parts))] = draw.choice(parts)[::-1]
    return " ".join(parts)


def write_examples(path: Path, documents: int, gigabytes: float, templated: bool) -> None:
    """A file of JSON lines like the specification's dataset. One in five is a near-duplicate of an earlier one."""
    draw = random.Random(1)
    length = int(gigabytes * 1e9 / documents) - 180
    text = installed_text(250).replace("\r", "")
    recent: list[str] = []
    template = text[1000 : 1000 + length]
    with path.open("w", encoding="utf-8") as out:
        for number in range(documents):
            if templated and number % 2:
                body = changed(template, draw, draw.randint(3, 40))
            elif number % 5 == 4:
                body = changed(draw.choice(recent), draw, draw.randint(1, 12))
            else:
                third = length // 3
                starts = [draw.randrange(len(text) - third) for _ in range(3)]
                body = "\n".join(text[start : start + third] for start in starts)
            if len(recent) < 20_000:
                recent.append(body)
            else:
                recent[draw.randrange(20_000)] = body
            row = {
                "instruction": body[: length // 4],
                "response": body[length // 4 :],
                "metadata": {"domain": "code", "quality_score": draw.randint(0, 10), "source": f"s{number % 6}"},
                "id": f"example-{number}",
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- engines


def _shingles(text: str) -> set[str]:
    return {text[start : start + CONFIG.shingle] for start in range(max(1, len(text) - CONFIG.shingle + 1))}


def per_shingle(texts: list[str]) -> None:
    """datasketch as most write it, the specification's code too: one ``update`` for each shingle."""
    from datasketch import MinHash

    for text in texts:
        signature = MinHash(num_perm=CONFIG.permutations)
        for shingle in _shingles(text):
            signature.update(shingle.encode())


def bulk(texts: list[str]) -> None:
    """datasketch with all shingles of a document at once."""
    from datasketch import MinHash

    encoded = ([shingle.encode() for shingle in _shingles(text)] for text in texts)
    for _ in MinHash.generator(encoded, num_perm=CONFIG.permutations):
        pass


def bulk_whole(texts: list[str]) -> None:
    """datasketch end to end: bulk signatures, its LSH, exact Jaccard on Python's sets."""
    dedup(texts, CONFIG.model_copy(update={"engine": "datasketch"}))


def rensa_signatures(texts: list[str]) -> None:
    """rensa's full path (R-MinHash, every shingle), from text."""
    from rensa import RMinHash

    for text in texts:
        sketch = RMinHash(num_perm=CONFIG.permutations, seed=1)
        sketch.update(list(_shingles(text)))
        sketch.digest()


def rensa_whole(texts: list[str]) -> None:
    """rensa end to end: R-MinHash, its LSH with our bands, exact Jaccard on Python's sets, the same keep rule."""
    from rensa import RMinHash, RMinHashLSH

    used = CONFIG.bands * (CONFIG.permutations // CONFIG.bands)
    index = RMinHashLSH(threshold=CONFIG.threshold, num_perm=used, num_bands=CONFIG.bands)
    sets: dict[int, set[str]] = {}
    for number, text in enumerate(texts):
        own = _shingles(text)
        sketch = RMinHash(num_perm=used, seed=1)
        sketch.update(list(own))
        for other in index.query(sketch):
            if len(own & sets[other]) >= CONFIG.threshold * len(own | sets[other]):
                break
        else:
            sets[number] = own
            index.insert(number, sketch)


def our_signatures(texts: list[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        read_corpus(texts, CONFIG, pool)


def ours(texts: list[str]) -> None:
    dedup(texts, CONFIG, workers=1)


def ours_all_cores(texts: list[str]) -> None:
    dedup(texts, CONFIG)


def engines(texts: list[str]) -> Row:
    """Every engine on the same texts in one run; the slow ones on a share of them, so that a run ends."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ways: list[tuple[str, Callable[[list[str]], None], float]] = [
        ("signatures: datasketch, update per shingle", per_shingle, 0.05),
        ("signatures: datasketch, bulk", bulk, 0.25),
        ("signatures: rensa R-MinHash, full path", rensa_signatures, 1),
        ("signatures: cogumi, one thread", our_signatures, 1),
        ("end to end: datasketch, bulk", bulk_whole, 0.25),
        ("end to end: rensa R-MinHash", rensa_whole, 1),
        ("end to end: cogumi, one thread", ours, 1),
        (f"end to end: cogumi, {cores()} threads", ours_all_cores, 1),
    ]
    rows: list[Row] = []
    for name, way, share in ways:
        part = texts[: max(20, int(len(texts) * share))]
        way(texts[:20])  # imports, compilation and caches are not what is measured
        best = float("inf")
        for _ in range(3 if share == 1 else 1):
            started = time.perf_counter()
            way(part)
            best = min(best, time.perf_counter() - started)
        size = sum(len(text.encode()) for text in part) / 1e6
        rows.append({"way": name, "documents": len(part), "mb_per_s": size / best, "docs_per_s": len(part) / best})
    for row in rows:
        row["times_the_specification"] = row["mb_per_s"] / rows[0]["mb_per_s"]
    return {"documents": len(texts), "megabytes": megabytes, "rows": rows}


# --- recall and precision


def recall(texts: list[str]) -> Row:
    """Found pairs against all pairs computed exactly, and planted near-duplicates at known similarities."""
    draw = random.Random(2)
    kept, _ = dedup(texts, CONFIG.model_copy(update={"bands": CONFIG.permutations}))
    base = [text for text, keep in zip(texts, kept, strict=True) if keep and len(text) > 300]
    levels: dict[str, Row] = {}
    for target in (0.80, 0.85, 0.90, 0.95):
        pairs = [(text, planted(text, target, draw)) for text in base[:400]]
        alone = [(one, two, jaccard(shingle_set(one, 3), shingle_set(two, 3))) for one, two in pairs]
        found = sum(not dedup([one, two], CONFIG, ids=["a", "b"])[0].all() for one, two, _ in alone)
        similar = sum(similarity >= CONFIG.threshold for *_, similarity in alone)
        levels[f"{target:.2f}"] = {"planted": similar, "found": found, "recall": found / max(1, similar)}
    mixed = [*base[:1500], *(planted(text, draw.uniform(0.76, 0.99), draw) for text in base[:1500])]
    exact = all_pairs(mixed)
    mask, report = dedup(mixed, CONFIG.model_copy(update={"keep": "first"}))
    # A removed text is right if an earlier kept one is at the threshold: precision. Two kept ones at the threshold
    # are a pair that was missed: recall counts them against all pairs that the rule had to resolve.
    missed = int(sum(bool(mask[one] and mask[two]) for one, two in exact))
    removed = np.flatnonzero(~mask).tolist()
    partners = {two: [one for one, other in exact if other == two] for two in removed}
    right = sum(any(mask[one] for one in partners[number]) for number in removed)
    return {
        "all_pairs": {
            "texts": len(mixed), "pairs_at_threshold": len(exact), "left": missed,
            "recall": 1 - missed / max(1, len(exact)), "removed": report.removed,
            "precision": right / max(1, len(removed)),
        },
        "planted": levels,
    }  # fmt: skip


def planted(text: str, target: float, draw: random.Random) -> str:
    """A copy changed word by word until its exact similarity is just at or above ``target``."""
    whole, best, copy = shingle_set(text, 3), text, text
    for _ in range(200):
        copy = changed(copy, draw, 1)
        if jaccard(whole, shingle_set(normalise(copy), 3)) < target:
            return best
        best = normalise(copy)
    return best


def all_pairs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """All pairs at or above the threshold, by a sparse matrix product: exact."""
    from scipy.sparse import csr_matrix

    sets = [shingle_set(text, CONFIG.shingle) for text in texts]
    codes, columns = np.unique(np.concatenate(sets), return_inverse=True)
    sizes = np.array([len(one) for one in sets])
    begins = np.concatenate(([0], np.cumsum(sizes)))
    matrix = csr_matrix((np.ones(len(columns), np.int32), columns, begins), shape=(len(texts), len(codes)))
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(texts), 256):
        shared = (matrix[start : start + 256] @ matrix.T).toarray()
        either = sizes[start : start + 256, None] + sizes[None, :] - shared
        rows, others = np.nonzero(shared >= CONFIG.threshold * either)
        pairs += [(int(r) + start, int(o)) for r, o in zip(rows, others, strict=True) if r + start < o]
    return pairs


# --- full size and growth


def full(documents: int, gigabytes: float, templated: bool, folder: Path) -> Row:
    """Read, deduplicate and write a file of this size, in a process of its own; its time and memory."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch) / "in.jsonl"
        write_examples(source, documents, gigabytes, templated)
        size = source.stat().st_size
        command = [sys.executable, __file__, "one", str(source), str(Path(scratch) / "out.jsonl")]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall = time.perf_counter() - started
    return {**json.loads(done.stdout), "gigabytes": size / 1e9, "seconds": wall, "templated": templated}


def one(source: Path, out: Path) -> None:
    report = dedup_files([source], out, CONFIG)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024 / 1e9
    fields = ("documents", "kept", "removed", "categories", "largest_cluster", "candidates_verified")
    print(
        json.dumps(
            {**{name: getattr(report, name) for name in fields}, "peak_gb": peak, "written": os.stat(out).st_size}
        )
    )


def growth(templated: bool, folder: Path) -> Iterator[Row]:
    for documents in (10_000, 40_000, 150_000, 750_000):
        yield full(documents, documents * 2.3 / 750_000, templated, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engines", "recall", "full", "growth", "one"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--templated", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: Any
    if given.what == "one":
        one(*given.files)
        return
    if given.what == "engines":
        result = engines(real_texts(given.files, given.documents or 3000))
        print(f"{result['documents']:,} documents, {result['megabytes']:.1f} MB, {cores()} cores")
        for row in result["rows"]:
            times = f"{row['mb_per_s']:9.2f} MB/s {row['docs_per_s']:10,.0f} docs/s"
            print(f"{row['way']:46} {times} {row['times_the_specification']:8.1f}x")
    elif given.what == "recall":
        result = recall(real_texts(given.files, given.documents or 4000))
        print(json.dumps(result, indent=1))
    elif given.what == "full":
        documents = given.documents or 750_000
        result = full(documents, given.gigabytes or documents * 2.3 / 750_000, given.templated, given.folder)
        print(json.dumps(result, indent=1))
    else:
        result = []
        for row in growth(given.templated, given.folder):
            result.append(row)
            speed = 1000 * row["gigabytes"] / row["seconds"]
            print(f"{row['documents']:9,} examples {row['seconds']:8.1f} s {speed:7.1f} MB/s {row['peak_gb']:5.2f} GB, "
                  f"largest cluster {row['largest_cluster']:,}", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
