"""The student's tokenizer, rebuilt exactly from a GGUF's metadata.

transformers' own conversion loses the digit splitting and most special tokens (facts: 45 of 1,941
chunks of source code got other ids than llama.cpp gives). Here the pre-tokenizer is chosen by the
GGUF's own ``tokenizer.ggml.pre``, and ``agreement`` proves it against llama.cpp on varied strings.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.llama_log import quiet_llama

CONTROL = 3
"""``tokenizer.ggml.token_type`` of a control token (llama.cpp's LLAMA_TOKEN_TYPE_CONTROL)."""


def tokenizer_from_gguf(metadata: dict[str, Any]) -> Any:
    """A ``PreTrainedTokenizerFast`` with the ids that llama.cpp gives."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pre = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise CogumiError(
            f"no exact tokenizer is known for the pre-tokenizer {pre!r}", "use a checkpoint that has its tokenizer.json"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if pre == "smollm" else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def token_of(name: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if token_id is None else tokens[token_id]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token_of("bos"),
        eos_token=token_of("eos"),
        unk_token=token_of("unknown"),
        pad_token=token_of("padding") or token_of("eos"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
"""The pre-tokenizers' regular expressions in the ``tokenizer.json`` of Llama 3 and of Qwen2, Qwen2.5 and Qwen3."""

_SPLITS = {LLAMA3_PATTERN: ("llama-bpe", True), QWEN2_PATTERN: ("qwen2", False)}
"""pattern -> (llama.cpp's id, whether its tokenizer takes a word that is a token whole, past the merges)."""


def pre_tokenizer_id(tokenizer: Any) -> str:
    """The ``tokenizer.ggml.pre`` under which llama.cpp tokenizes as this tokenizer does.

    Known are the byte-level BPE tokenizers of SmolLM2, GPT-2, Llama 3 and Qwen2 (2.5, 3). llama.cpp does not
    compose characters first, as Qwen's does (NFC): text that is not in NFC gets other ids.

    Raises:
        CogumiError: another kind of tokenizer, which llama.cpp would silently cut elsewhere.
    """
    import json

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = state["model"], state["pre_tokenizer"] or {"type": "None"}
    parts = pre.get("pretokenizers", [pre])
    kinds = [part["type"] for part in parts]
    normalizer = (state["normalizer"] or {"type": None})["type"]
    marked = any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"))
    if model["type"] != "BPE" or marked or kinds[-1] != "ByteLevel":
        raise CogumiError(
            f"no pre-tokenizer id of llama.cpp is known for a {model['type']} tokenizer with {kinds}",
            "export a checkpoint with a byte-level BPE tokenizer (SmolLM2, Llama 3, Qwen)",
        )
    found, whole_words = _split_of(parts)
    by_regex = parts[-1].get("use_regex", True)
    if not found or by_regex != (kinds[0] != "Split") or parts[-1]["add_prefix_space"]:
        raise CogumiError(f"no pre-tokenizer id of llama.cpp is known for {parts}", "export a Llama or Qwen checkpoint")
    if bool(model.get("ignore_merges")) != whole_words:
        raise CogumiError(
            f"a {found} tokenizer with ignore_merges = {model.get('ignore_merges', False)} is not one of llama.cpp's",
            f"set ignore_merges to {str(whole_words).lower()} in tokenizer.json if that is how it was trained",
        )
    if normalizer not in ((None, "NFC") if found == "qwen2" else (None,)):
        raise CogumiError(f"llama.cpp does not normalize text ({normalizer})", "train with a tokenizer that does not")
    return found


def _split_of(parts: list[dict[str, Any]]) -> tuple[str, bool]:
    """(llama.cpp's id, whether whole words are taken past the merges) of what stands before ``ByteLevel``."""
    match parts:
        case [{"type": "ByteLevel"}]:
            return "gpt-2", False
        case [{"type": "Digits", "individual_digits": True}, _]:
            return "smollm", False
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}, _]:
            return _SPLITS.get(pattern, ("", False))
    return "", False


@dataclass(frozen=True)
class TokenizerAgreement:
    """How often two tokenizers gave the same ids, and the first string on which they did not."""

    strings: int
    same: int
    round_trips: int
    first_difference: str


def varied_strings(count: int, seed: int) -> list[str]:
    """Code, prose, emoji, long numbers, several scripts, whitespace and control tokens, reproducibly."""
    import inspect
    import json
    import textwrap

    draw = random.Random(seed)
    lines = [line for module in (inspect, json, textwrap, random) for line in inspect.getsource(module).splitlines()]
    words = [
        *["the", "of", "model", "straße", "naïve", "你好", "世界", "مرحبا", "שלום", "привет", "नमस्ते", "don't", "I'LL"],
        "😀",
        "👩\u200d🚀",
        "\ufb01",
    ]
    words += ["<|im_end|>", "<|im_start|>user"]
    spaces = [" ", "  ", "\n", "\t", "\n\n  ", "\r\n", "\u00a0", ""]

    def one() -> str:
        kind = draw.randrange(4)
        if kind == 0:
            start = draw.randrange(len(lines))
            return "\n".join(lines[start : start + draw.randint(1, 6)])
        if kind == 1:
            return "".join(draw.choice(words) + draw.choice(spaces) for _ in range(draw.randint(1, 20)))
        if kind == 2:
            return draw.choice(["", "-", "$"]) + "".join(
                draw.choice("0123456789.,eE") for _ in range(draw.randint(1, 40))
            )
        return "".join(
            chr(draw.choice([draw.randint(32, 126), draw.randint(160, 0x2FFF)])) for _ in range(draw.randint(1, 30))
        )

    return [one() for _ in range(count)]


def agreement(tokenizer: Any, gguf: Path, count: int, seed: int = 0) -> TokenizerAgreement:
    """Compare ids with llama.cpp's on ``count`` varied strings, and decode them back."""
    from llama_cpp import Llama

    with quiet_llama():
        llama = Llama(model_path=str(gguf), vocab_only=True, verbose=False)
    same = round_trips = 0
    first = ""
    for text in varied_strings(count, seed):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids == llama.tokenize(text.encode(), add_bos=False, special=True):
            same += 1
        elif not first:
            first = text
        round_trips += tokenizer.decode(ids, skip_special_tokens=False) == text
    llama.close()
    return TokenizerAgreement(count, same, round_trips, first)
