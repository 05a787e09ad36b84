"""Tiny random models of every architecture, with byte-level tokenizers cut as the published ones are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.training.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, varied_strings

WHOLE_WORD = "zqxjkv"
"""A token that no merges build: only a tokenizer with ``ignore_merges`` finds it."""

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

KIND_OF = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}
LOUD = 0.12
"""Standard deviation of the weights: see ``LOUD`` of the outer conftest."""


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[str], Any]:
    """llama.cpp's pre-tokenizer id -> a small tokenizer that is built and cut as the real one of that id."""
    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind not in made:
            made[kind] = _train(kind)
        return made[kind]

    return make


def _train(kind: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    by_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {"llama-bpe": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN}.get(kind)
    tokenizer = Tokenizer(BPE())
    match kind:
        case "gpt-2":
            tokenizer.pre_tokenizer = by_regex
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_regex])
        case _:
            cut = pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(varied_strings(300, 9), trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"][WHOLE_WORD] = len(state["model"]["vocab"])
    state["model"]["ignore_merges"] = kind == "llama-bpe"
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool_call>"])
    if kind == "llama-bpe":
        begin = [("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=begin)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model(byte_tokenizer: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """architecture, configuration -> a checkpoint of two layers with grouped queries; the same one when asked again.

    Norms and biases are random as well: as initialized, nothing would tell whether they were exported.
    """
    made: dict[str, Path] = {}

    def make(architecture: str, *, shard: str = "5GB", **changes: Any) -> Path:
        key = json.dumps([architecture, shard, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(architecture) / "checkpoint"
            _save_random(architecture, changes, byte_tokenizer(KIND_OF[architecture]), made[key], shard)
        return made[key]

    return make


def _save_random(architecture: str, changes: dict[str, Any], tokenizer: Any, out: Path, shard: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = {
        "vocab_size": 672, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": LOUD, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    if architecture == "qwen3":
        arguments["head_dim"] = 32
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **arguments | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 * torch.randn_like(parameter) + ("norm" in name))
    model.bfloat16().save_pretrained(out, max_shard_size=shard)
    tokenizer.save_pretrained(out)


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Any]:
    """checkpoint or GGUF, with an adapter or without -> log-probabilities (200, vocabulary) on 200 fixed ids."""
    ids = [(7 * i * i + 3 * i) % 640 for i in range(200)]

    def compute(model: Path, adapter: Path | None = None, change: Callable[[Any], None] = lambda model: None) -> Any:
        import torch

        logits = _llama_logits(model, ids, adapter) if model.suffix == ".gguf" else _own(model, ids, adapter, change)
        return torch.log_softmax(logits, -1)

    return compute


def _own(folder: Path, ids: list[int], adapter: Path | None, change: Callable[[Any], None]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        change(model)
        return model(torch.tensor([ids])).logits[0]


def _llama_logits(gguf: Path, ids: list[int], adapter: Path | None) -> Any:
    import numpy as np
    import torch
    from llama_cpp import Llama

    lora = str(adapter) if adapter else None
    llama = Llama(
        str(gguf),
        lora_path=lora,
        logits_all=True,
        n_ctx=256,
        n_batch=256,
        n_threads=2,
        n_threads_batch=2,
        verbose=False,
    )
    llama.eval(ids)
    rows = np.array(llama.scores[: len(ids)], dtype=np.float32)
    llama.close()
    return torch.from_numpy(rows)


@pytest.fixture(scope="session")
def mean_kl() -> Callable[[Any, Any], float]:
    """Mean over the tokens of KL(first || second), nats."""
    return lambda first, second: float((first.exp() * (first - second)).sum(-1).mean())
