"""MinHash signatures: ours against datasketch, on the same normalised text.

    python bench/dedup.py [FILE.jsonl ...] [--documents 2000] [--json OUT]

Prints a table and, with --json, writes the same figures. Without files the text is generated.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash

from cogumi_dagster.lib.curation.dedup import dedup, text_of_row
from cogumi_dagster.lib.curation.minhash import hash32, normalise, shingle_set, signatures
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl_tolerant
from cogumi_dagster.lib.profile import DedupConfig

CONFIG = DedupConfig()


def generated(documents: int, seed: int = 0) -> list[str]:
    """Documents of 40 to 160 made-up words; every fifth repeats an earlier one with a word or two changed."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 10))) for _ in range(4000)]
    texts: list[str] = []
    for number in range(documents):
        if number % 5 == 4:
            words = draw.choice(texts).split()
            for _ in range(draw.randint(1, 2)):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
        else:
            words = draw.choices(vocabulary, k=draw.randint(40, 160))
        texts.append(" ".join(words))
    return texts


def _shingles(text: str) -> set[str]:
    return {text[start : start + CONFIG.shingle] for start in range(max(1, len(text) - CONFIG.shingle + 1))}


def per_shingle(texts: list[str]) -> None:
    """datasketch as most write it, the specification's code too: one ``update`` for each shingle."""
    for text in texts:
        signature = MinHash(num_perm=CONFIG.permutations)
        for shingle in _shingles(text):
            signature.update(shingle.encode())


def bulk(texts: list[str]) -> None:
    """datasketch with all shingles of a document at once."""
    encoded = ([shingle.encode() for shingle in _shingles(text)] for text in texts)
    for _ in MinHash.generator(encoded, num_perm=CONFIG.permutations):
        pass


def ours(texts: list[str]) -> None:
    signatures(texts, CONFIG)


def whole_dedup(texts: list[str]) -> None:
    dedup(texts, CONFIG)


def equal_to_datasketch(texts: list[str]) -> bool:
    """Whether our signatures are datasketch's, given the same 32-bit hashes."""
    mine = signatures(texts, CONFIG)
    for number, text in enumerate(texts):
        theirs = MinHash(num_perm=CONFIG.permutations, hashfunc=int)
        theirs.update_batch(hash32(shingle_set(text, CONFIG.shingle)).tolist())
        if not np.array_equal(mine[:, number], theirs.hashvalues):
            return False
    return True


def measure(texts: list[str]) -> dict[str, Any]:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ways: dict[str, Callable[[list[str]], None]] = {
        "datasketch, update per shingle": per_shingle,
        "datasketch, bulk": bulk,
        "cogumi, signatures": ours,
        "cogumi, signatures + LSH + exact Jaccard": whole_dedup,
    }
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        way(texts[:20])  # imports and caches are not what is measured
        started = time.perf_counter()
        way(texts)
        seconds = time.perf_counter() - started
        rows.append(
            {"way": name, "seconds": seconds, "mb_per_s": megabytes / seconds, "docs_per_s": len(texts) / seconds}
        )
    for row in rows:
        row["speedup"] = rows[0]["seconds"] / row["seconds"]
    same = equal_to_datasketch(texts[:200])
    return {"documents": len(texts), "megabytes": megabytes, "signatures_equal_datasketch": same, "rows": rows}


def _read(files: Iterable[Path], documents: int) -> list[str]:
    rows = (row for path in files for row in read_jsonl_tolerant(path)[0])
    texts = [normalise(text) for row in rows if (text := text_of_row(row))][:documents]
    if not texts:
        raise CogumiError("the files hold no text", "give JSONL with instruction/response, question/answer or text")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--documents", type=int, default=2000, help="at most so many (default 2000)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    try:
        texts = _read(given.files, given.documents) if given.files else generated(given.documents)
    except CogumiError as error:
        sys.exit(str(error))
    result = measure(texts)
    size = f"{result['documents']:,} documents, {result['megabytes']:.2f} MB"
    print(f"{size}, {CONFIG.permutations} permutations, one process")
    print(f"signatures equal to datasketch's: {'yes' if result['signatures_equal_datasketch'] else 'NO'}\n")
    print(f"{'way':42} {'seconds':>9} {'MB/s':>8} {'docs/s':>9} {'speed-up':>9}")
    for row in result["rows"]:
        speeds = f"{row['mb_per_s']:8.2f} {row['docs_per_s']:9.0f} {row['speedup']:8.1f}x"
        print(f"{row['way']:42} {row['seconds']:9.3f} {speeds}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
