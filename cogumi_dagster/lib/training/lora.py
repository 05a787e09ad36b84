"""LoRA and QLoRA training: one loop for the base, the modifiers and the strategies."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import (
    Encoded,
    Pair,
    answer_loss,
    batches_of,
    collate,
    encode_pairs,
    schedule,
)  # fmt: skip
from cogumi_dagster.lib.training.precision import compute_dtype
from cogumi_dagster.lib.training.resume import newest_state, save_state

log = logging.getLogger(__name__)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did. Losses are means over supervised tokens; speed excludes loading."""

    examples: int
    too_long: int
    steps: int
    resumed_from: int
    tokens: int
    supervised_tokens: int
    padding_share: float
    trainable_parameters: int
    loss_first: float
    loss_last: float
    """Mean of the first and of the last fifth of the steps."""
    validation_loss_before: float
    validation_loss_after: float
    validation_examples: int
    tokens_per_second: float
    seconds: float
    precision: str
    curve: tuple[tuple[int, float], ...]


def load_base(checkpoint: Path, *, four_bit: bool, device: str) -> tuple[Any, Any]:
    """(model, tokenizer), frozen; in NF4 with double quantization where ``four_bit``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = compute_dtype(device)
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
        if four_bit
        else None
    )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=quantization, device_map={"": device}, local_files_only=True
    )
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.set_grad_enabled(True)
    return model, AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def train_lora(
    checkpoint: Path,
    pairs: Sequence[Pair],
    out: Path,
    config: LoraConfig,
    *,
    validation: Sequence[Pair] = (),
    scratch: Path,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> TrainingReport:
    """Train an adapter on ``pairs`` and save it to ``out`` in PEFT's form.

    ``scratch`` keeps the checkpoints: a killed run resumes from the newest valid one and takes the
    same steps (order, dropout and optimizer state are restored).

    Raises:
        CogumiError: nothing to train on, a batch without supervised tokens, or a loss that is not finite.
    """
    import torch
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    if not pairs:
        raise CogumiError("there is no example to train on", "look at the drops of the dataset this trains on")
    model, tokenizer = load_base(checkpoint, four_bit=config.load_in_4bit, device=device)
    encoded, too_long = encode_pairs(tokenizer, pairs, config.max_length)
    held_out = encode_pairs(tokenizer, validation, config.max_length)[0] if validation else []
    torch.manual_seed(seed)
    model = get_peft_model(
        model,
        PeftLora(
            r=config.rank_attention,
            rank_pattern={name: config.rank_feed_forward for name in FEED_FORWARD},
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=[*ATTENTION, *FEED_FORWARD],
            task_type="CAUSAL_LM",
        ),
    )
    run = _Run(model, tokenizer, encoded, config, scratch, seed, progress)
    before = evaluation_loss(model, held_out, config.batch_tokens, tokenizer.pad_token_id)
    run.train()
    after = evaluation_loss(model, held_out, config.batch_tokens, tokenizer.pad_token_id)
    model.save_pretrained(out)
    losses = [row["loss"] for row in run.log]
    fifth = max(1, len(losses) // 5)
    return TrainingReport(
        examples=len(encoded),
        too_long=too_long,
        steps=len(losses),
        resumed_from=run.resumed_from,
        tokens=int(sum(row["tokens"] for row in run.log)),
        supervised_tokens=int(sum(row["supervised"] for row in run.log)),
        padding_share=1 - sum(row["tokens"] for row in run.log) / max(1.0, sum(row["padded"] for row in run.log)),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        loss_first=sum(losses[:fifth]) / fifth,
        loss_last=sum(losses[-fifth:]) / fifth,
        validation_loss_before=before,
        validation_loss_after=after,
        validation_examples=len(held_out),
        tokens_per_second=sum(row["tokens"] for row in run.log) / max(1e-9, sum(row["seconds"] for row in run.log)),
        seconds=sum(row["seconds"] for row in run.log),
        precision=("NF4 + " if config.load_in_4bit else "") + str(compute_dtype(device)).removeprefix("torch."),
        curve=tuple((int(row["step"]), row["loss"]) for row in run.log),
    )


def evaluation_loss(model: Any, encoded: Sequence[Encoded], batch_tokens: int, pad: int) -> float:
    """Mean loss per supervised token; NaN where there is nothing to evaluate on."""
    import torch

    if not encoded:
        return math.nan
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in batches_of(encoded, batch_tokens, pad):
            total += float(answer_loss(model, batch)) * batch.supervised
            count += batch.supervised
    model.train()
    return total / count


class _Run:
    """The loop and all that must be restored to continue it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        encoded: Sequence[Encoded],
        config: LoraConfig,
        scratch: Path,
        seed: int,
        progress: Progress,
    ) -> None:
        import torch

        self.model, self.pad, self.config = model, tokenizer.pad_token_id, config
        self.batches = schedule(encoded, config.batch_tokens, config.epochs, config.max_steps, seed)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.999)
        )
        self.scratch, self.progress = scratch, progress
        self.log: list[dict[str, float]] = []
        self.resumed_from = 0

    def train(self) -> None:
        start = self._restore()
        self.model.train()
        for step in range(start, len(self.batches)):
            row = self._step(step)
            self.log.append(row)
            self.progress(step + 1, len(self.batches), f"loss {row['loss']:.3f}")
            if (step + 1) % self.config.save_every == 0 and step + 1 < len(self.batches):
                self._save(step + 1)

    def _step(self, step: int) -> dict[str, float]:
        import torch

        started = time.perf_counter()
        batch = collate(self.batches[step], self.pad)
        rate = self.config.learning_rate * _cosine(step, len(self.batches), self.config.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = answer_loss(self.model, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CogumiError(
                f"the loss is {value} at step {step + 1} (learning rate {rate:.2e}, examples {list(batch.indices)})",
                "lower training.learning_rate, or look at those examples; the last checkpoint is kept",
            )
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip))
        if not math.isfinite(norm):
            raise CogumiError(f"the gradient is not finite at step {step + 1}", "lower training.learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step + 1,
            "loss": value,
            "rate": rate,
            "gradient_norm": norm,
            "tokens": batch.tokens,
            "padded": batch.ids.numel(),
            "supervised": batch.supervised,
            "seconds": time.perf_counter() - started,
        }

    def _save(self, step: int) -> None:
        import torch

        state = {
            "adapter": {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        save_state(self.scratch, step, state, self.log)

    def _restore(self) -> int:
        import torch

        found = newest_state(self.scratch)
        if found is None:
            return 0
        step, state, self.log = found
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state["adapter"].items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.resumed_from = step
        log.info("resumed from step %d of %d", step, len(self.batches))
        return step


def _cosine(step: int, steps: int, warmup_share: float) -> float:
    """Linear warm-up, then a half cosine to zero; 1 at the top."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
