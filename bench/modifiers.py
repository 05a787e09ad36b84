"""Modifiers: what pruning costs at equal shares, and learning rates against each other.

    python bench/modifiers.py pruning STORE MODIFIER [--shares 0.6 0.78 0.85 0.9]
    python bench/modifiers.py rates STORE MODIFIER OUT [--rates 1e-3 5e-4 2.5e-4 1.25e-4]

STORE is the store of a profile that was run (.cogumi/quick). ``pruning``: directions left out by what they move (ours)
and by size, and the smallest weights zeroed; losses are of the modifier's own lessons that were held back from
training, not of the replay, 128 at most. ``rates`` trains the modifier anew with each rate, on a GPU where there is
one, into folders of OUT, which bench/forgetting.py takes; its losses are of all that was held back.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.compression.gguf_lora import CONFIG_FILE, WEIGHTS_FILE
from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE
from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint
from cogumi_dagster.lib.modifiers.prune import Directions, asked_of, loss_of, module_curvature
from cogumi_dagster.lib.modifiers.train import (
    REPLAY,
    answered_rows,
    modifier_pairs,
    replayed_rows,
    split_lessons,
    train_on_served_weights,
)
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.training.batches import Pair, encode_pairs
from cogumi_dagster.lib.training.precision import resolve_device
from cogumi_dagster.lib.training.student import load_checkpoint


def zero_smallest(adapter: Path, out: Path, share: float) -> None:
    from safetensors.torch import load_file, save_file

    out.mkdir()
    (out / CONFIG_FILE).write_text((adapter / CONFIG_FILE).read_text())
    tensors = load_file(adapter / WEIGHTS_FILE)
    for tensor in tensors.values():
        tensor.view(-1)[tensor.abs().flatten().topk(int(share * tensor.numel()), largest=False).indices] = 0.0
    save_file(tensors, out / WEIGHTS_FILE)


@dataclass(frozen=True)
class Trained:
    """What a modifier of ``store`` was trained on, and how."""

    store: ArtifactStore
    name: str

    @property
    def adapter(self) -> Path:
        return self.store.get("modifier_adapter", self.name).path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.store.get("modifier_adapter", self.name).manifest.config

    @property
    def served(self) -> tuple[Path, Path]:
        """The GGUF, and the checkpoint whose tokenizer it has."""
        return self.store.get("gguf_model").path / MODEL_FILE, self.store.get("base_checkpoint").path

    def pairs(self) -> list[Pair]:
        failures, taught = (self.store.get(name, self.name).path for name in ("domain_failures", "cascade_examples"))
        share, seed = self.config["modifiers.replay_share"], self.config["seed"]
        return modifier_pairs(answered_rows(taught), replayed_rows(failures, taught), share, seed)


def rates(trained: Trained, arguments: argparse.Namespace) -> None:
    own = LoraConfig(**trained.config["modifiers.training"]).of_rank(trained.config["modifiers.rank"][trained.name])
    print("| learning rate | held-back loss before | after | steps | tokens |\n|---|---|---|---|---|")
    for rate in arguments.rates:
        out = arguments.out / f"{trained.name}-{rate:.3g}"
        report = train_on_served_weights(
            *trained.served, trained.pairs(), out, own.model_copy(update={"learning_rate": rate}),
            scratch=arguments.out / f"scratch-{rate:.3g}", device=resolve_device("auto"), seed=trained.config["seed"],
            balance=True, section="modifiers.training",
        )  # fmt: skip
        losses = f"{report.validation_loss_before:.3f} | {report.validation_loss_after:.3f}"
        print(f"| {rate:.3g} | {losses} | {report.steps} | {report.tokens} |", flush=True)


def pruning(trained: Trained, arguments: argparse.Namespace) -> None:
    from peft import PeftModel

    name, adapter = trained.name, trained.adapter
    length = trained.config["modifiers.training"]["max_length"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dequantize_checkpoint(*trained.served, folder / "served")
        base, tokenizer = load_checkpoint(folder / "served", "float32")
        model: Any = PeftModel.from_pretrained(base, adapter).eval()
        taken, kept_back = split_lessons(trained.pairs(), trained.config["seed"])
        lessons = encode_pairs(tokenizer, taken, length)[0]
        held_back = asked_of(encode_pairs(tokenizer, [one for one in kept_back if one.group != REPLAY], length)[0])

        def loss(label: str = "") -> float:
            if label:
                model.load_adapter(folder / label, label)
                model.set_adapter(label)
            found = loss_of(model, held_back)
            if label:
                model.set_adapter("default")
                model.delete_adapter(label)
            return found

        with model.disable_adapter():
            before = loss()
        whole = loss()
        started = time.perf_counter()
        curvatures = module_curvature(model, lessons)
        seconds = time.perf_counter() - started
        print(f"{name}: {len(lessons)} lessons trained on, {len(held_back)} held back; loss of the base {before:.3f},")
        print(f"with the whole adapter {whole:.3f}; what directions move: measured in {seconds:.0f} s. Gain kept:\n")
        print("| left out | by what they move: modules, largest rank | by size | smallest weights zeroed |")
        print("|---|---|---|---|")
        ways = {"moves": Directions(adapter, curvatures), "size": Directions(adapter)}
        for number, share in enumerate(arguments.shares):
            cells = []
            for way, directions in ways.items():
                ranks, _ = directions.write(folder / f"{way}{number}", share)
                kept = (before - loss(f"{way}{number}")) / (before - whole)
                cells.append(f"{kept:.3f}: {len(ranks)}, {max(ranks.values())}")
            zero_smallest(adapter, folder / f"zeroed{number}", share)
            kept = (before - loss(f"zeroed{number}")) / (before - whole)
            print(f"| {share:.0%} | {' | '.join(cells)} | {kept:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for command in (pruning, rates):
        one = commands.add_parser(command.__name__)
        one.set_defaults(command=command)
        one.add_argument("store", type=Path)
        one.add_argument("modifier")
        if command is rates:
            one.add_argument("out", type=Path)
            one.add_argument("--rates", type=float, nargs="+", default=[1e-3, 5e-4, 2.5e-4, 1.25e-4])
        else:
            one.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.78, 0.85, 0.9])
    arguments = parser.parse_args()
    arguments.command(Trained(ArtifactStore(arguments.store), arguments.modifier), arguments)


if __name__ == "__main__":
    main()
