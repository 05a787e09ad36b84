from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.compression.compressor import calibration_set, load_sound
from cogumi_dagster.lib.compression.prune import (
    Targets,
    class_weights,
    embedding_tables,
    layers_of,
    prune_model,
    require_prunable,
    steps_of,
    zero_share,
)
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import PruningConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.lora import ATTENTION, FEED_FORWARD

METHODS = ("wanda", "magnitude", "sparsegpt")


def targets(attention: float, feed_forward: float, embeddings: float = 0.0, pattern: tuple[int, int] = (0, 0)) -> Any:
    return Targets(float("nan"), attention, feed_forward, embeddings, pattern)


def pruned(student: Path, pairs: list[Pair], method: str, *steps: Targets) -> Any:
    model, tokenizer = load_sound(student)
    data = None if method == "magnitude" else calibration_set(tokenizer, pairs, 4, 32)
    for step in steps:
        prune_model(model, data, method, step)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_each_class_is_as_sparse_as_asked(student: Path, pairs: list[Pair], method: str) -> None:
    model = pruned(student, pairs, method, targets(0.3, 0.6, 0.5))
    shares = {name: zero_share(weights) for name, weights in class_weights(model).items()}
    assert shares == {
        "attention": pytest.approx(0.3, abs=0.02),
        "feed_forward": pytest.approx(0.6, abs=0.02),
        "embeddings": pytest.approx(0.5, abs=0.05),  # rows of tokens that nothing uses are zero before
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_later_step_keeps_every_zero_of_an_earlier_one(student: Path, pairs: list[Pair], method: str) -> None:
    first = class_weights(pruned(student, pairs, method, targets(0.2, 0.3, 0.1)))
    both = class_weights(pruned(student, pairs, method, targets(0.2, 0.3, 0.1), targets(0.4, 0.6, 0.5)))
    for name in first:
        for early, late in zip(first[name], both[name], strict=True):
            assert (late[early == 0] == 0).all(), name
    assert zero_share(both["feed_forward"]) == pytest.approx(0.6, abs=0.02)


def test_nothing_of_the_pruner_stays_on_the_model(
    student: Path, pairs: list[Pair], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = pruned(student, pairs, "wanda", targets(0.3, 0.6))
    capfd.readouterr()
    assert not any(hasattr(module, "_original_forward_func") for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    model.save_pretrained(tmp_path / "out")
    assert "Dispatching" not in capfd.readouterr().err
    again, _ = load_sound(student)
    assert type(next(again.modules())._parameters) is type(next(model.modules())._parameters)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_holds_in_every_group_and_grows(student: Path, pairs: list[Pair], method: str) -> None:
    steps = [targets(0.25, 0.25, pattern=(1, 4)), targets(0.5, 0.5, pattern=(2, 4))]
    for zeros, model in ((1, pruned(student, pairs, method, *steps[:1])), (2, pruned(student, pairs, method, *steps))):
        for name, layer in layers_of(model, (*ATTENTION, *FEED_FORWARD)).items():
            assert ((layer.weight.reshape(-1, 4) == 0).sum(-1) >= zeros).all(), name


def test_magnitude_takes_the_smallest_of_each_row_and_keeps_the_rest(student: Path, pairs: list[Pair]) -> None:
    before, _ = load_sound(student)
    after = pruned(student, pairs, "magnitude", targets(0.3, 0.6, 0.5))
    for one, other in zip(class_weights(before).values(), class_weights(after).values(), strict=True):
        for weight, left in zip(one, other, strict=True):
            gone = left == 0
            assert (weight[~gone] == left[~gone]).all()
            largest_gone = weight.abs().masked_fill(~gone, 0.0).amax(-1)
            smallest_kept = weight.abs().masked_fill(gone, float("inf")).amin(-1)
            assert (largest_gone <= smallest_kept).all()


def test_a_head_of_its_own_is_pruned_like_the_embedding(untied_student: Path, pairs: list[Pair]) -> None:
    model = pruned(untied_student, pairs, "magnitude", targets(0, 0, 0.5))
    assert set(embedding_tables(model)) == {"embeddings", "head"}
    assert all(0.5 <= zero_share([weight]) < 0.55 for weight in embedding_tables(model).values())


def test_a_tied_embedding_stays_tied(student: Path, pairs: list[Pair]) -> None:
    model = pruned(student, pairs, "wanda", targets(0.3, 0.3, 0.5))
    assert set(embedding_tables(model)) == {"embeddings"}


def test_steps_grow_in_proportion_to_the_schedule_and_end_at_the_class_targets() -> None:
    config = PruningConfig(
        sparsity_attention=0.6, sparsity_feed_forward=0.7, sparsity_embeddings=0.5, schedule=(0.16, 0.33, 0.49, 0.65)
    )
    steps = steps_of(config)
    assert [step.overall for step in steps] == [0.16, 0.33, 0.49, 0.65]
    assert (steps[-1].attention, steps[-1].feed_forward, steps[-1].embeddings) == (0.6, 0.7, 0.5)
    assert steps[0].feed_forward == pytest.approx(0.7 * 0.16 / 0.65)
    eighths = PruningConfig(
        sparsity_attention=0.0, sparsity_feed_forward=0.5, mask_structure="4:8", schedule=(0.1, 0.2, 0.3, 0.4)
    )
    assert [step.pattern for step in steps_of(eighths)] == [(1, 8), (2, 8), (3, 8), (4, 8)]
    assert [step.feed_forward for step in steps_of(eighths)] == [0.125, 0.25, 0.375, 0.5]
    assert {step.attention for step in steps_of(eighths)} == {0.0}


def test_no_schedule_is_one_step() -> None:
    (only,) = steps_of(PruningConfig(sparsity_attention=0.3, sparsity_feed_forward=0.6))
    assert (only.attention, only.feed_forward, only.embeddings, only.pattern) == (0.3, 0.6, 0.0, (0, 0))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"mask_structure": "2:24", "sparsity_attention": 2 / 24, "sparsity_feed_forward": 2 / 24},
            "2:24 does not divide the 64 columns of model.layers.0.self_attn.q_proj",
        ),
        ({"schedule": (0.1, 0.9)}, r"the schedule ends at 0.9 of all weights, but the class targets make 0\.\d+"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(student: Path, changes: dict[str, Any], problem: str) -> None:
    model, _ = load_sound(student)
    with pytest.raises(CogumiError, match=problem):
        require_prunable(model, PruningConfig.model_validate(changes))


def test_a_pattern_that_straddles_the_blocks_of_sparsegpt_is_refused(student: Path) -> None:
    model, _ = load_sound(student)
    for layer in layers_of(model, (*ATTENTION, *FEED_FORWARD)).values():
        layer.weight.data = layer.weight.data.new_zeros(4, 192)
    third = {"mask_structure": "1:3", "sparsity_attention": 1 / 3, "sparsity_feed_forward": 1 / 3}
    require_prunable(model, PruningConfig.model_validate(third))
    with pytest.raises(CogumiError, match="SparseGPT prunes 128 columns at once, which 1:3 does not divide"):
        require_prunable(model, PruningConfig.model_validate({**third, "method": "sparsegpt"}))


def test_another_architecture_is_refused(student: Path) -> None:
    model, _ = load_sound(student)
    for layer in model.model.layers:
        layer.mlp.fc = layer.mlp.gate_proj
        del layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
    with pytest.raises(CogumiError, match="no feed_forward layers named gate_proj, up_proj, down_proj"):
        require_prunable(model, PruningConfig())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sparsity_attention": 1.0}, "less than 1"),
        ({"schedule": (0.3, 0.2)}, "does not rise"),
        ({"schedule": (0.0, 0.2)}, "does not rise"),
        ({"schedule": (0.3, 1.0)}, "less than 1"),
        ({"mask_structure": "4:2"}, "4:2 is no pattern"),
        ({"mask_structure": "half"}, "match pattern"),
        ({"mask_structure": "2:4", "sparsity_feed_forward": 0.7}, "sparsity_attention is 0.2: set it to 0.5"),
        (
            {
                "mask_structure": "2:4", "sparsity_attention": 0.5, "sparsity_feed_forward": 0.5,
                "schedule": (0.1, 0.2, 0.3),
            },
            r"2:4 cannot grow in the 3 steps of \[0.1, 0.2, 0.3\]: the zeros of a group would be \[1, 1, 2\]",
        ),
    ],
)  # fmt: skip
def test_a_config_that_means_nothing_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PruningConfig.model_validate(changes)
