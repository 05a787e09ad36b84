"""The training loop: one for one process and for many, on a CPU and on GPUs, and all that must be kept to resume it.

What a step computes does not depend on how it is cut: losses and gradients are sums over the supervised tokens of the
whole step, divided once. So rows may be halved when memory runs out, or spread over processes.
"""

import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError, out_of_memory
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.progress import Progress
from cogumi_dagster.lib.resume import newest_step, save_step
from cogumi_dagster.lib.training.batches import Encoded
from cogumi_dagster.lib.training.flops import step_flops
from cogumi_dagster.lib.training.memory import reused_memory
from cogumi_dagster.lib.training.packing import (
    Packed,
    answer_losses,
    common_beginning,
    pack,
    rows_of,
    schedule,
    skip_positions,
)
from cogumi_dagster.lib.training.workers import Workers

log = logging.getLogger(__name__)

STATE = "state.pt"
GIVEN_BACK_EVERY = 10
"""Steps after which memory that is free is given back, for what still comes in other sizes."""


def evaluation_loss(model: Any, encoded: Sequence[Encoded], row_tokens: int, workers: Workers | None = None) -> float:
    """Mean loss per supervised token; NaN where there is nothing to evaluate on."""
    import torch

    if not encoded:
        return math.nan
    workers = workers or Workers()
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    longest = max(len(item.ids) for item in encoded)
    with torch.no_grad():
        for row in workers.share(rows_of(encoded, max(row_tokens, longest))):
            packed = pack(row)
            total += torch.tensor([float(answer_losses(model, packed)), packed.supervised], dtype=torch.float64)
    model.train()
    workers.sum([total])
    return float(total[0] / total[1])


class Loop:
    """Trains the parameters of ``model`` that require gradients. ``log`` has one row a step.

    ``losses`` (model, packed row) is the sum of the losses over the row's supervised tokens (cross-entropy when left
    out); ``after_step`` is called when the optimizer has changed the weights, and before they are kept; ``section`` of
    the profile is named in errors.
    """

    def __init__(
        self,
        model: Any,
        encoded: Sequence[Encoded],
        held_out: Sequence[Encoded],
        config: LoraConfig,
        scratch: Path,
        seed: int,
        progress: Progress,
        workers: Workers,
        *,
        losses: Callable[[Any, Packed], Any] | None = None,
        after_step: Callable[[], None] | None = None,
        section: str = "training",
    ) -> None:
        import torch

        self.model, self.config, self.seed, self.workers = model, config, seed, workers
        self.held_out, self.examples = held_out, len(encoded)
        self.losses, self.after_step, self.section = losses or answer_losses, after_step, section
        self.steps = schedule(encoded, config.batch_tokens, config.epochs, config.max_steps, seed)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.999), fused=True
        )
        self.row_tokens = config.row_tokens or config.batch_tokens
        self.scratch, self.progress = scratch, progress
        self.log: list[dict[str, float]] = []
        self.evaluations: list[tuple[int, float]] = []
        self.best: dict[str, Any] | None = None
        self.stopped_early = False
        self.resumed_from = 0
        self.notes: list[str] = []
        self._key = _fingerprint(self.steps, config, seed)

    def train(self) -> None:
        """Run all steps, from the newest checkpoint on; the best evaluated weights are kept where there are any."""
        with reused_memory() as self.give_back:
            self._train()

    def _train(self) -> None:
        start = self._restore()
        self.model.train()
        for step in range(start, len(self.steps)):
            if self.stopped_early:
                break
            row = self._step(step)
            self.log.append(row)
            if (step + 1) % GIVEN_BACK_EVERY == 0:
                self.give_back()
            if self.config.evaluate_every and (step + 1) % self.config.evaluate_every == 0:
                self._evaluate(step + 1)
            self.progress(step + 1, len(self.steps), f"loss {row['loss']:.3f}")
            if (step + 1) % self.config.save_every == 0 and step + 1 < len(self.steps):
                self._save(step + 1)
        if self.best is not None:
            if self.log[-1]["step"] != self.evaluations[-1][0]:
                self._evaluate(int(self.log[-1]["step"]))
            self._put(self.best)

    def _step(self, step: int) -> dict[str, float]:
        import torch

        started = time.perf_counter()
        items = self._items(step)
        rate = self.config.learning_rate * cosine(step, len(self.steps), self.config.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = self._gradients(step, items)
        where = f"at step {step + 1} (learning rate {rate:.2e}, examples {[item.index for item in items]})"
        mend = f"lower {self.section}.learning_rate, or look at those examples; the last checkpoint is kept"
        if not math.isfinite(value):
            raise CogumiError(f"the loss is {value} {where}", mend)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip))
        if not math.isfinite(norm):
            raise CogumiError(f"the gradient is not finite {where}", mend)
        recent = [row["loss"] for row in self.log[-20:]]
        if len(recent) >= 10 and value > self.config.explosion * max(0.5, sorted(recent)[len(recent) // 2]):
            raise CogumiError(f"the loss has exploded to {value:.2f} {where}", mend)
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step + 1,
            "loss": value,
            "rate": rate,
            "gradient_norm": norm,
            "tokens": sum(len(item.ids) for item in items),
            "supervised": sum(len(item.ids) - item.answer_start for item in items),
            "flops": step_flops(
                self.model, items, self.trained, checkpointing=self.config.gradient_checkpointing, shared=self.saved
            ),
            "seconds": time.perf_counter() - started,
        }

    def _items(self, step: int) -> list[Encoded]:
        """The examples of one step, with skips in their positions where wanted: the same after a resume, and however it
        is cut."""
        items, most, rng = self.steps[step], self.config.position_skips, random.Random(f"{self.seed} {step}")
        if not most:
            return items
        beginning = common_beginning(items) if len(items) > 1 else 0
        return [skip_positions(item, most, rng, beginning) for item in items]

    def _gradients(self, step: int, items: Sequence[Encoded]) -> float:
        """Gradients of the mean loss of one step, summed over rows and processes; rows are halved if memory ends."""
        import torch

        while True:
            # the dropout of a step depends on nothing before it: the same after a resume and after a second try
            torch.manual_seed((self.seed + 1) * 1_000_003 + step * 1009 + self.workers.rank)
            try:
                return self._accumulate(items)
            except Exception as error:
                longest = max(len(item.ids) for item in items)
                if not out_of_memory(error) or self.row_tokens <= longest or self.workers.count > 1:
                    raise
                self.row_tokens = max(longest, min(self.row_tokens, sum(len(i.ids) for i in items)) // 2)
                note = f"out of memory at step {step + 1}: rows of {self.row_tokens} tokens from here on"
                log.warning("%s", note)
                self.notes.append(note)
                self.optimizer.zero_grad(set_to_none=True)
            self.give_back()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _accumulate(self, items: Sequence[Encoded]) -> float:
        import torch

        supervised = sum(len(item.ids) - item.answer_start for item in items)
        longest, tokens = max(len(item.ids) for item in items), sum(len(item.ids) for item in items)
        room = max(longest, min(self.row_tokens, -(-tokens // self.workers.count)))
        total = torch.zeros(2, dtype=torch.float64)  # loss, tokens saved by sharing
        for row in self.workers.share(rows_of(items, room)):
            packed = pack(row)
            loss = self.losses(self.model, packed) / supervised
            loss.backward()
            total += torch.tensor([float(loss.detach()), packed.saved], dtype=torch.float64)
        if self.workers.count > 1:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.workers.sum([p.grad for p in self.parameters])
            self.workers.sum([total])
        self.saved = int(total[1])
        return float(total[0])

    def _evaluate(self, step: int) -> None:
        loss = evaluation_loss(self.model, self.held_out, self.row_tokens, self.workers)
        if math.isnan(loss):
            return
        self.evaluations.append((step, loss))
        losses = [value for _, value in self.evaluations]
        if loss <= min(losses):
            self.best = self._weights()
        waited = len(losses) - 1 - losses.index(min(losses))
        self.stopped_early = self.config.patience is not None and waited >= self.config.patience

    def _weights(self, *, clone: bool = True) -> dict[str, Any]:
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: p.clone() for name, p in trained.items()} if clone else trained

    def _put(self, weights: dict[str, Any]) -> None:
        import torch

        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)

    def _save(self, step: int) -> None:
        import torch

        if self.workers.rank == 0:
            state = {"adapter": self._weights(clone=False), "optimizer": self.optimizer.state_dict(), "best": self.best}
            said = {
                "log": self.log, "evaluations": self.evaluations, "notes": self.notes, "row_tokens": self.row_tokens,
                "stopped_early": self.stopped_early,
            }  # fmt: skip
            save_step(self.scratch, step, lambda folder: torch.save(state, folder / STATE), said, self._key)

    def _restore(self) -> int:
        import torch

        found = newest_step(self.scratch, self._key)
        if found is None:
            return 0
        step, folder, said = found
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
        self._put(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.log = state["best"], said["log"]
        self.evaluations = [(at, loss) for at, loss in said["evaluations"]]
        self.notes, self.row_tokens, self.stopped_early = said["notes"], said["row_tokens"], said["stopped_early"]
        self.resumed_from = step
        log.info("resumed from step %d of %d", step, len(self.steps))
        return step


def cosine(step: int, steps: int, warmup_share: float) -> float:
    """Linear warm-up, then a half cosine to zero; 1 at the top."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _fingerprint(steps: Sequence[Sequence[Encoded]], config: LoraConfig, seed: int) -> str:
    """What a checkpoint belongs to: the data in its order, and all that changes the steps."""
    digest = hashlib.sha256(json.dumps([config.model_dump(mode="json"), seed]).encode())
    for step in steps:
        for item in step:
            digest.update(repr((item.answer_start, item.ids)).encode())
    return digest.hexdigest()
