"""What trimming the vocabulary brings and costs, by how many of the first merges are kept besides the corpus's tokens.

    python bench/trim.py --folder DIR [--keep 0 2048 8192 16384 32768] [--checkpoint DIR --dataset DIR]
        [--held-out FILE]

The corpus is the training split; coverage, tokens a word and perplexity (by the untrimmed tokenizer's tokens) are of
the held-out split, or of FILE's first answers (any that ``cogumi curate`` reads). Bytes are of the 16-bit checkpoint
and of a Q5_K_M file. Decoding reads the file once a token, so that trimming is worth it where the bytes read for a
word fall: the file shrinks by more than texts grow.
"""

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path

from compression_inputs import add_arguments, inputs

from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.compression.mix import read_layout
from cogumi_dagster.lib.compression.predict import predict_bytes
from cogumi_dagster.lib.curation.records import read_records
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.trim import trim_vocabulary


def quantized_bytes(checkpoint: Path, scratch: Path) -> int:
    write_gguf(checkpoint, scratch)
    layout = read_layout(scratch)
    scratch.unlink()
    return predict_bytes(layout.shapes, "Q5_K_M", layout.header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="*", type=int, default=[0, 2048, 8192, 16384, 32768])
    parser.add_argument("--held-out", type=Path)
    add_arguments(parser)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    data = inputs(given)
    held_out = data.held_out
    if given.held_out:
        records = (r for r in read_records(given.held_out) if r.response)
        held_out = [Pair(r.instruction, str(r.response)) for r in islice(records, 64)]
    whole = quantized_bytes(data.checkpoint, given.folder / "f16.gguf")
    rows = []
    print("| kept besides the corpus | vocabulary | saved of the 16-bit file | of Q5_K_M | coverage | tokens a word | "
          "bytes a word | perplexity |\n" + 8 * "|---" + "|")  # fmt: skip
    for keep in given.keep:
        out = given.folder / "trimmed"
        shutil.rmtree(out, ignore_errors=True)
        report = trim_vocabulary(data.checkpoint, data.train, held_out, out, keep=keep)
        saved = whole - quantized_bytes(out, given.folder / "f16.gguf")
        growth = report.tokens_per_word_after / report.tokens_per_word_before
        per_word = growth * (1 - saved / whole)
        rows.append({"keep": keep, "saved_quantized": saved, "bytes_per_word": per_word, **vars(report)})
        print(
            f"| {keep:,} | {report.vocabulary_after:,} | {report.bytes_saved / 1e6:.1f} MB | {saved / 1e6:.1f} MB of "
            f"{whole / 1e6:.1f} | {report.coverage:.4f} | {report.tokens_per_word_before:.2f} -> "
            f"{report.tokens_per_word_after:.2f} | x {per_word:.2f} | "
            f"x {report.perplexity_ratio:.3f} ({report.perplexity_tokens}) |",
            flush=True,
        )
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
