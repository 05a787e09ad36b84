"""llama.cpp cuts a text into the ids that the checkpoint's own tokenizer gives."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, pre_tokenizer_id, varied_strings

WHOLE_WORD = "zqxjkv"
STRINGS = 400
HARD = [
    "", " ", "\n\n", "  \n  x", "I'LL don't WE'VE", "a1b22c333d4444 12345678901234567890", "\t\tf(x):\r\n\treturn x",
    "😀👩\u200d🚀🏳️\u200d🌈", "مرحبا بالعالم ١٢٣", "שלום עולם", "नमस्ते दुनिया", "ﬁ½²Ⅷ一二", "naïve",
    "<|im_start|>user\nhi<|im_end|>", "<tool_call>{}", "<|im_start", "x" * 300, " " * 50 + "x", "\u00a0\u2003\u3000y",
    f"{WHOLE_WORD} {WHOLE_WORD}s",
]  # fmt: skip

Tokenizers = Callable[[str], Any]


@pytest.fixture
def written(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[[Any], Path]:
    """tokenizer -> the GGUF of a tiny Llama with it."""
    import shutil

    def write(tokenizer: Any) -> Path:
        shutil.copytree(tiny_model("llama"), tmp_path / "checkpoint")
        (tmp_path / "checkpoint" / "tokenizer.json").unlink()
        tokenizer.save_pretrained(tmp_path / "checkpoint")
        write_gguf(tmp_path / "checkpoint", tmp_path / "out.gguf")
        return tmp_path / "out.gguf"

    return write


def llama_ids(gguf: Path, texts: list[str], *, add_bos: bool = False) -> list[list[int]]:
    from llama_cpp import Llama

    llama = Llama(str(gguf), vocab_only=True, verbose=False)
    ids = [llama.tokenize(text.encode(), add_bos=add_bos, special=True) for text in texts]
    llama.close()
    return ids


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_ids_are_the_same(kind: str, byte_tokenizer: Tokenizers, written: Callable[[Any], Path]) -> None:
    tokenizer = byte_tokenizer(kind)
    gguf = written(tokenizer)
    assert open_gguf(gguf).metadata["tokenizer.ggml.pre"] == kind == pre_tokenizer_id(tokenizer)
    texts = HARD + varied_strings(STRINGS, 11)
    if kind == "qwen2":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    found = llama_ids(gguf, texts)
    wrong = [
        text for text, ids in zip(texts, found, strict=True) if ids != tokenizer.encode(text, add_special_tokens=False)
    ]
    assert not wrong
    assert all(tokenizer.decode(ids, skip_special_tokens=False) == text for text, ids in zip(texts, found, strict=True))


def test_the_pre_tokenizers_differ_where_it_matters(byte_tokenizer: Tokenizers) -> None:
    """A wrong id would be noticed by the strings above."""
    texts = HARD + varied_strings(STRINGS, 11)
    cuts = {
        kind: [
            tuple(piece for piece, _ in byte_tokenizer(kind).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))
            for text in texts
        ]
        for kind in ("gpt-2", "smollm", "llama-bpe", "qwen2")
    }
    for first in cuts:
        for second in cuts:
            assert (cuts[first] == cuts[second]) == (first == second)


def test_llama_cpp_does_not_compose_characters(byte_tokenizer: Tokenizers, written: Callable[[Any], Path]) -> None:
    """The one known difference: Qwen's tokenizer composes text (NFC), llama.cpp takes it as it is."""
    tokenizer = byte_tokenizer("qwen2")
    [found] = llama_ids(written(tokenizer), ["e\u0301"])
    assert found != tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.decode(found) == "e\u0301"


def test_the_patterns_are_those_of_transformers() -> None:
    import inspect

    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert QWEN2_PATTERN == PRETOKENIZE_REGEX
    assert inspect.signature(TikTokenConverter).parameters["pattern"].default == LLAMA3_PATTERN


def test_a_whole_word_is_taken_past_the_merges_by_llama3_only(byte_tokenizer: Tokenizers) -> None:
    assert len(byte_tokenizer("llama-bpe").encode(WHOLE_WORD, add_special_tokens=False)) == 1
    assert len(byte_tokenizer("qwen2").encode(WHOLE_WORD)) > 1


def test_tokens_specials_and_templates_are_written(byte_tokenizer: Tokenizers, written: Callable[[Any], Path]) -> None:
    tokenizer = byte_tokenizer("llama-bpe")
    gguf = written(tokenizer)
    metadata = open_gguf(gguf).metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template
    types = metadata["tokenizer.ggml.token_type"]
    assert types[tokenizer.eos_token_id] == TokenType.CONTROL
    assert types[tokenizer.convert_tokens_to_ids("<tool_call>")] == TokenType.USER_DEFINED
    assert types[len(tokenizer) :] == [TokenType.UNUSED] * (len(types) - len(tokenizer))
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{len(types) - 1}]"
    assert llama_ids(gguf, ["hello"], add_bos=True) == [tokenizer.encode("hello")]


def test_several_templates_are_all_written(byte_tokenizer: Tokenizers, written: Callable[[Any], Path]) -> None:
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer("smollm"))
    tokenizer.chat_template = {"default": "one", "tool_use": "two"}
    metadata = open_gguf(written(tokenizer)).metadata
    assert metadata["tokenizer.chat_template"] == "one"
    assert metadata["tokenizer.chat_template.tool_use"] == "two"


def changed(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")


def set_pre(**part: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["pre_tokenizer"]["pretokenizers"][0].update(part)


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("qwen2", set_pre(pattern={"Regex": r"\p{L}+"}), "no pre-tokenizer id"),
        ("qwen2", set_pre(behavior="Removed"), "no pre-tokenizer id"),
        ("smollm", set_pre(individual_digits=False), "no pre-tokenizer id"),
        ("gpt-2", lambda state: state["pre_tokenizer"].update(add_prefix_space=True), "no pre-tokenizer id"),
        ("gpt-2", lambda state: state.update(pre_tokenizer=None), "no pre-tokenizer id"),
        ("gpt-2", lambda state: state["model"].update(byte_fallback=True), "no pre-tokenizer id"),
        ("llama-bpe", lambda state: state["model"].update(ignore_merges=False), "ignore_merges = False"),
        ("qwen2", lambda state: state["model"].update(ignore_merges=True), "ignore_merges = True"),
        ("smollm", lambda state: state.update(normalizer={"type": "Lowercase"}), r"does not normalize .*Lowercase"),
        ("smollm", lambda state: state["added_tokens"][0].update(lstrip=True), "swallows spaces"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_cut_elsewhere_is_refused(
    kind: str,
    change: Callable[[dict[str, Any]], None],
    problem: str,
    byte_tokenizer: Tokenizers,
    written: Callable[[Any], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(CogumiError, match=problem):
        written(changed(byte_tokenizer(kind), change))
    assert not (tmp_path / "out.gguf").exists()


def test_more_tokens_than_embeddings_are_refused(byte_tokenizer: Tokenizers, written: Callable[[Any], Path]) -> None:
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer("smollm"))
    tokenizer.add_tokens([f"<extra_{n}>" for n in range(100)])
    with pytest.raises(CogumiError, match=r"tokens but the embeddings have 672 rows: '<extra_\d+>' has the id 672"):
        written(tokenizer)
