"""What one link of the parity chain does with the fixed prompts: the ids it sees, its log-probabilities, its answers.

Ids and answers come from the link's own tokenizer and chat template. Log-probabilities are taken on ids that are the
same for all links, so that a divergence is one of weights and a difference of ids is one of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.gguf_logits import Outputs, flatten, gguf_answer_logits
from cogumi_dagster.lib.inference.base import Message
from cogumi_dagster.lib.inference.llama import LlamaEngine, free_cores
from cogumi_dagster.lib.training.batches import Pair, encode_pairs, prompt_ids
from cogumi_dagster.lib.training.merge import answer_logits
from cogumi_dagster.lib.training.student import load_checkpoint

ANSWER_TOKENS = 36
"""Room for an answer: solutions of the chain's benchmark have up to 56 characters, about 32 tokens of SmolLM2."""


@dataclass(frozen=True)
class Observed:
    """What a link did. Of the served one the texts and ids are not to be had, only how many ids it counted."""

    texts: list[str]
    """The prompts as rendered."""
    ids: list[list[int]]
    prompt_tokens: list[int]
    outputs: Outputs
    """Over the solutions, flattened; of the served link over their first tokens (see ``first_tokens``)."""
    answers: list[str]
    """Greedy."""


def observe_checkpoint(folder: Path, pairs: Sequence[Pair], shared: Any, *, adapter: Path | None = None) -> Observed:
    """A Hugging Face folder in float32, with a PEFT adapter if given. ``shared`` is the tokenizer of the shared ids."""
    model, tokenizer = load_checkpoint(folder, "float32")
    if adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise CogumiError(f"the adapter {adapter} does not fit {folder}: {error}", "train it on this") from error
    outputs = flatten(answer_logits(model, shared, pairs, 1 << 30))
    if adapter:  # in float32 the same function, and it decodes twice as fast
        model = model.merge_and_unload()
    ids = [prompt_ids(tokenizer, pair.instruction) for pair in pairs]
    return Observed(
        texts=[render(tokenizer, pair.instruction) for pair in pairs],
        ids=ids,
        prompt_tokens=[len(one) for one in ids],
        outputs=outputs,
        answers=_continue(model, tokenizer, ids),
    )


def observe_gguf(gguf: Path, pairs: Sequence[Pair], shared: Any) -> Observed:
    """A GGUF file in the llama.cpp library: its own tokenizer, and the template in its metadata."""
    from llama_cpp import Llama

    outputs = flatten(gguf_answer_logits(gguf, shared, pairs))
    longest = max(len(prompt_ids(shared, pair.instruction)) for pair in pairs)
    threads = free_cores()
    llama = Llama(
        model_path=str(gguf),
        n_ctx=2 * longest + ANSWER_TOKENS,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    try:
        template = llama.metadata.get("tokenizer.chat_template")
        texts = [render(shared, pair.instruction, template) for pair in pairs]
        ids = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
        answers = []
        for one in ids:
            made: Any = llama.create_completion(one, max_tokens=ANSWER_TOKENS, temperature=0.0)
            answers.append(made["choices"][0]["text"])
    finally:
        llama.close()
    return Observed(texts, ids, [len(one) for one in ids], outputs, answers)


def observe_served(gguf: Path, pairs: Sequence[Pair], shared: Any, vocabulary: int) -> Observed:
    """The engine that serves, asked as a user asks it: messages in, text out. ``vocabulary``: rows of the head."""
    import torch

    conversations: list[list[Message]] = [[{"role": "user", "content": pair.instruction}] for pair in pairs]
    engine = _Server(gguf, slots=min(8, len(pairs)))
    try:
        answers = engine.chat_many(conversations, max_tokens=ANSWER_TOKENS)
        firsts = torch.tensor([engine.first_token(messages, vocabulary) for messages in conversations])
    finally:
        engine.close()
    targets = torch.tensor([shared.encode(pair.response, add_special_tokens=False)[0] for pair in pairs])
    return Observed([], [], [a.prompt_tokens for a in answers], [(firsts, targets)], [a.text for a in answers])


class _Server(LlamaEngine):
    def first_token(self, messages: Sequence[Message], vocabulary: int) -> list[float]:
        """Log-probabilities of the answer's first token, by token id."""
        request = self._request(None, {"max_tokens": 1})
        request |= {"messages": list(messages), "logprobs": True, "top_logprobs": vocabulary}
        found = [float("-inf")] * vocabulary

        def receive(event: Any) -> bool:
            for item in event if isinstance(event, list) else [event]:
                for choice in item.get("choices", ()):
                    for token in (choice.get("logprobs") or {}).get("content") or ():
                        for one in token["top_logprobs"]:
                            found[one["id"]] = one["logprob"]
            return False

        self._server.handle_chat_completions(request, receive)
        return found


def first_tokens(outputs: Outputs, shared: Any, pairs: Sequence[Pair]) -> Outputs:
    """Of flattened outputs, the rows that predict the first token of each answer, in the order of ``pairs``."""
    encoded, _ = encode_pairs(shared, pairs, 1 << 30)
    rows, at = {}, 0
    for item in sorted(encoded, key=lambda item: len(item.ids)):  # the order of the outputs
        rows[item.index] = at
        at += len(item.ids) - item.answer_start
    ((logs, targets),) = outputs
    chosen = [rows[index] for index in range(len(pairs))]
    return [(logs[chosen], targets[chosen])]


def render(tokenizer: Any, instruction: str, template: str | None = None) -> str:
    """The text of a prompt in a chat template; the tokenizer's own where none is given."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return text


def _continue(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Greedy answers, all prompts in one batch."""
    import torch

    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in made]
