"""Ids of llama.cpp from our export against the tokenizer's own, on varied strings, with the published vocabularies.

    python bench/token_ids.py KIND=FILE ... [--strings 10000] [--json OUT]

KIND is qwen2 or llama-bpe, FILE its vocabulary in tiktoken's form: ``qwen.tiktoken`` (in the package dashscope) or
Llama 3's ``tokenizer.model`` (in llama-models). The tokenizer is built of it as the published ``tokenizer.json`` is,
put beside a random model of one layer, exported, and read by llama.cpp. Qwen's composes characters (NFC), llama.cpp
does not: strings that are not in NFC are counted apart.
"""

import argparse
import base64
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.training.student import save_checkpoint
from cogumi_dagster.lib.training.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, varied_strings

SPECIALS = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama-bpe": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
}
MODEL = {"qwen2": "qwen2", "llama-bpe": "llama"}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of a token into two tokens, in the order of the ranks: as transformers converts tiktoken's files."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges.extend((rank, *pair) for pair in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])))
    return [(left, right) for _, left, right in merges]


def build(kind: str, file: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(text(left), text(right)) for left, right in merges_of(ranks)]
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "llama-bpe"))
    pattern = QWEN2_PATTERN if kind == "qwen2" else LLAMA3_PATTERN
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(SPECIALS[kind])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIALS[kind][0], eos_token=SPECIALS[kind][2])


def compare(kind: str, file: Path, strings: int) -> dict[str, Any]:
    from llama_cpp import Llama
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build(kind, file)
    config = AutoConfig.for_model(
        MODEL[kind], vocab_size=len(tokenizer) + 61, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    texts = varied_strings(strings, seed=4)
    row = {"kind": kind, "tokens": len(tokenizer), "strings": 0, "same": 0, "not NFC": 0, "of these same": 0}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(AutoModelForCausalLM.from_config(config).bfloat16(), tokenizer, Path(folder) / "checkpoint")
        write_gguf(Path(folder) / "checkpoint", Path(folder) / "f16.gguf")
        llama = Llama(str(Path(folder) / "f16.gguf"), vocab_only=True, verbose=False)
        for text in texts:
            same = tokenizer.encode(text) == llama.tokenize(text.encode(), add_bos=False, special=True)
            composed = kind != "qwen2" or unicodedata.is_normalized("NFC", text)
            row["strings" if composed else "not NFC"] += 1
            row["same" if composed else "of these same"] += same
        llama.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabularies", nargs="+", metavar="KIND=FILE")
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for item in given.vocabularies:
        kind, _, file = item.partition("=")
        rows.append(compare(kind, Path(file), given.strings))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
