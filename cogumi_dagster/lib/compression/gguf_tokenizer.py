"""A tokenizer and its chat template in a GGUF's metadata."""

import json
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.tokenizer import pre_tokenizer_id


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Write vocabulary, merges, special tokens and template. ``rows`` of the embeddings without a token are unused.

    Raises:
        CogumiError: a token beyond the embeddings, or a tokenizer that llama.cpp cannot stand in for.
    """
    import gguf

    pre = pre_tokenizer_id(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(vocabulary) >= rows:
        beyond = min(token_id for token_id in vocabulary if token_id >= rows)
        raise CogumiError(
            f"the tokenizer has {max(vocabulary) + 1} tokens but the embeddings have {rows} rows: "
            f"{vocabulary[beyond]!r} has the id {beyond}",
            "resize the embeddings, or take the tokenizer that the model was trained with",
        )
    types = dict.fromkeys(range(rows), gguf.TokenType.UNUSED) | dict.fromkeys(vocabulary, gguf.TokenType.NORMAL)
    for entry in state["added_tokens"]:
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
            raise CogumiError(
                f"the added token {entry['content']!r} swallows spaces or wants whole words, which GGUF cannot say",
                "add it without lstrip, rstrip and single_word",
            )
        types[entry["id"]] = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
    merges = state["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([vocabulary.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)])
    writer.add_token_types([types[token_id] for token_id in range(rows)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    before, after = _added_around(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def write_vocabulary(tokenizer: Any, rows: int, out: Path) -> None:
    """A GGUF of the tokenizer alone, for llama.cpp to tokenize with; raises what ``add_tokenizer`` refuses."""
    from gguf import GGUFWriter

    writer = GGUFWriter(out, "llama")
    try:
        add_tokenizer(writer, tokenizer, rows)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    finally:
        writer.close()


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether encoding puts BOS before a text, and EOS after it."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for before in (False, True):
        for after in (False, True):
            if whole == [tokenizer.bos_token_id] * before + plain + [tokenizer.eos_token_id] * after:
                return before, after
    raise CogumiError(
        f"the tokenizer puts {tokenizer.convert_ids_to_tokens(whole)} around a text, which GGUF cannot say",
        "use a tokenizer that adds at most BOS and EOS",
    )
