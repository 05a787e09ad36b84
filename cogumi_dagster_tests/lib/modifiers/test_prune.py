import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.modifiers.prune import (
    MOST_EXAMPLES,
    PREFIX,
    Directions,
    asked_of,
    loss_of,
    module_curvature,
    prune_where_quality_holds,
)
from cogumi_dagster.lib.training.batches import Encoded, Pair, batches_of, encode_pairs, supervised_logits
from cogumi_dagster.lib.training.loop import evaluation_loss
from cogumi_dagster.lib.training.student import load_checkpoint


def products(folder: Path) -> dict[str, Any]:
    """What an adapter adds to each module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    found = {}
    for name in names:
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        alpha = next(
            (v for k, v in (config["alpha_pattern"] or {}).items() if k.replace("\\", "") == name.removeprefix(PREFIX)),
            config["lora_alpha"],
        )
        found[name] = b @ a * (alpha / len(a))
    return found


def redrawn(adapter: Path, folder: Path, values: Callable[[str, Any, torch.Generator], Any]) -> Path:
    """The adapter with other weights: (name, shape, draw) -> tensor."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    draw = torch.Generator().manual_seed(0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    drawn = {name: values(name, tensor.shape, draw) for name, tensor in tensors.items()}
    save_file(drawn, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def low_rank(adapter: Path, tmp_path: Path) -> Path:
    """An adapter whose modules have one strong direction each, the others weak."""

    def strong_and_weak(name: str, shape: Any, draw: torch.Generator) -> Any:
        values = 0.01 * torch.randn(shape, generator=draw)
        strong = values[0] if ".lora_A." in name else values[:, 0]
        strong.copy_(torch.randn(strong.shape, generator=draw))
        return values

    return redrawn(adapter, tmp_path / "low", strong_and_weak)


def test_the_strong_directions_stay(low_rank: Path, tmp_path: Path) -> None:
    whole = products(low_rank)
    ranks, removed = Directions(low_rank).write(tmp_path / "out", 0.6)
    pruned = products(tmp_path / "out")
    assert 0.6 <= removed < 0.7 and min(ranks.values()) >= 1
    for name, product in whole.items():
        assert (pruned[name] - product).norm() < 0.01 * product.norm()


def test_nothing_removed_is_the_same_adapter(low_rank: Path, tmp_path: Path) -> None:
    _, removed = Directions(low_rank).write(tmp_path / "out", 0.0)
    assert removed == 0.0
    pruned = products(tmp_path / "out")
    assert all(torch.allclose(pruned[name], product, atol=1e-5) for name, product in products(low_rank).items())


def test_peft_reads_the_pruned_adapter_though_modules_are_gone(low_rank: Path, student: Path, tmp_path: Path) -> None:
    tensors = load_file(low_rank / "adapter_model.safetensors")
    gone = {name: tensor * (0.0 if ".0.self_attn.k_proj" in name else 1.0) for name, tensor in tensors.items()}
    save_file(gone, low_rank / "adapter_model.safetensors")
    ranks, _ = Directions(low_rank).write(tmp_path / "out", 0.5)
    assert not any(".0.self_attn.k_proj" in name for name in ranks)
    base, _ = load_checkpoint(student, "float32")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items() if ".lora_" in name}
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)


def test_the_largest_share_that_keeps_the_gain_is_taken(
    low_rank: Path, student: Path, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = load_checkpoint(student, "float32")
    model = PeftModel.from_pretrained(base, low_rank)
    encoded, _ = encode_pairs(tokenizer, pairs[:8], 512)
    losses = iter([2.0, 1.0, 1.2, 1.04])
    monkeypatch.setattr("cogumi_dagster.lib.modifiers.prune.evaluation_loss", lambda *args: next(losses))
    chosen, report = prune_where_quality_holds(
        model, low_rank, encoded, encoded, tmp_path / "tries", shares=(0.3, 0.5, 0.6), keeps=0.95
    )
    assert [round(row.gain_kept, 2) for row in report.tried] == [0.8, 0.96]
    assert report.chosen == report.tried[1].removed and 0.5 <= report.chosen < 0.6
    assert chosen == tmp_path / "tries" / "pruned_1" and model.active_adapter == "pruned_1"

    losses = iter([2.0, 1.0, 1.9])
    kept, report = prune_where_quality_holds(
        model, low_rank, encoded, encoded, tmp_path / "t2", shares=(0.7,), keeps=0.95
    )
    assert (kept, report.chosen, model.active_adapter) == (low_rank, 0.0, "default")
    losses = iter([1.0, 1.5])
    kept, report = prune_where_quality_holds(
        model, low_rank, encoded, encoded, tmp_path / "t3", shares=(0.7,), keeps=0.95
    )
    assert (kept, report.tried) == (low_rank, ()) and "no gain" in report.outcome
    losses = iter([2.0, 1.0])
    kept, report = prune_where_quality_holds(
        model, low_rank, encoded, encoded[:7], tmp_path / "t4", shares=(0.7,), keeps=0.95
    )
    assert (kept, report.tried) == (low_rank, ()) and "7 held-back lessons are too few" in report.outcome


def test_held_back_lessons_are_asked_at_random() -> None:
    lessons = [Encoded(ids=(1, 2), answer_start=1, index=at) for at in range(1000)]
    chosen = [one.index for one in asked_of(lessons)]
    assert len(set(chosen)) == MOST_EXAMPLES and max(chosen) > 900, "not the first, which may have one answer"
    assert len(asked_of(lessons[:5])) == 5


def test_a_loss_is_that_of_each_lesson_by_itself(low_rank: Path, student: Path, pairs: list[Pair]) -> None:
    """Rows share their beginning, which an attention that knows no packed rows would hide from all but the first."""
    base, tokenizer = load_checkpoint(student, "float32")
    model = PeftModel.from_pretrained(base, low_rank).eval()
    encoded, _ = encode_pairs(tokenizer, pairs[:8], 512)
    losses, tokens = 0.0, 0
    for item in encoded:
        with torch.no_grad():
            logits = model(torch.tensor([item.ids])).logits[0, item.answer_start - 1 : -1]
        wanted = torch.tensor(item.ids[item.answer_start :])
        losses += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        tokens += len(item.ids) - item.answer_start
    assert loss_of(model, encoded) == pytest.approx(losses / tokens, rel=1e-4)
    with pytest.raises(RuntimeError, match="not that for packed rows"):
        evaluation_loss(model, encoded, 1024)


@pytest.fixture
def small(adapter: Path, tmp_path: Path) -> Path:
    """An adapter that changes answers a little, in directions of one size."""
    return redrawn(adapter, tmp_path / "small", lambda _, shape, draw: 0.05 * torch.randn(shape, generator=draw))


@pytest.fixture
def trained(small: Path, student: Path, pairs: list[Pair]) -> tuple[Any, list[Any]]:
    """The student with it, and lessons."""
    base, tokenizer = load_checkpoint(student, "float32")
    encoded, _ = encode_pairs(tokenizer, pairs[:24], 512)
    return PeftModel.from_pretrained(base, small), encoded


def test_what_the_answers_do_not_depend_on_is_left_out_first(
    trained: tuple[Any, list[Any]], small: Path, tmp_path: Path
) -> None:
    model, lessons = trained
    curvatures = module_curvature(model, lessons)
    assert curvatures.keys() == Directions(small).modules.keys()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    batches = list(batches_of(lessons, 2048, 0))

    def answers(name: str) -> list[Any]:
        model.set_adapter(name)
        model.eval()
        with torch.no_grad():
            return [torch.log_softmax(supervised_logits(model, batch)[0], -1) for batch in batches]

    def lost(name: str) -> float:
        pairs = zip(answers("default"), answers(name), strict=True)
        return sum(float((whole.exp() * (whole - pruned)).sum()) for whole, pruned in pairs)

    for name, directions in (("size", Directions(small)), ("worth", Directions(small, curvatures))):
        _, removed = directions.write(tmp_path / name, 0.7)
        assert 0.7 <= removed < 0.8
        model.load_adapter(tmp_path / name, name)
    by_worth, by_size = lost("worth"), lost("size")
    assert 0 < by_worth < 0.7 * by_size, (by_worth, by_size)


def test_weighed_directions_together_are_the_same_adapter(
    trained: tuple[Any, list[Any]], small: Path, tmp_path: Path
) -> None:
    Directions(small, module_curvature(*trained, tokens=500)).write(tmp_path / "out", 0.0)
    pruned = products(tmp_path / "out")
    for name, product in products(small).items():
        assert (pruned[name] - product).norm() < 1e-3 * product.norm()
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert max(float(tensor.abs().max()) for tensor in kept.values()) < 1e3, "F16 holds them"


def test_a_share_that_leaves_nothing_is_refused(low_rank: Path, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="leaves nothing"):
        Directions(low_rank).write(tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()
