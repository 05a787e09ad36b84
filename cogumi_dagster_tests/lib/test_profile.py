from importlib.resources import files
from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DOMAINS, LoraConfig, Profile, load_profile

SHIPPED = sorted(Path(str(files("resources").joinpath("profiles"))).glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_profile_loads(path: Path) -> None:
    profile = load_profile(path)
    assert profile.name == path.stem
    assert profile.description
    assert set(profile.teaching.mix) == set(DOMAINS)


def test_there_are_shipped_profiles() -> None:
    assert {"quick", "tiny"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("sead: 1", "unknown key 'sead' at the top level", "did you mean 'seed'?"),
        ("training: {learning_rat: 1.0}", "unknown key 'learning_rat' in training", "did you mean 'learning_rate'?"),
        ("compression: {awq: {group: 3}}", "unknown key 'group' in compression.awq", "did you mean 'group_size'?"),
        ("modifiers: {training: {max_step: 3}}", "unknown key 'max_step' in modifiers.training", "'max_steps'"),
        (
            "teaching: {mix: {code: [{teacher: solver, shar: 1.0, share: 1.0}]}}",
            "unknown key 'shar' in teaching.mix.code.0",
            "did you mean 'share'?",
        ),
    ],
)
def test_a_typo_names_file_key_and_nearest(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CogumiError) as caught:
        load_profile(path)
    assert str(path) in caught.value.problem
    assert key in caught.value.problem
    assert nearest in caught.value.mend


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("training: {epochs: -1}", "training.epochs"),
        ("training: {epochs: many}", "not 'many'"),
        ("dataset: {mix: {coding: 1.0}}", "dataset.mix.coding"),
        ("modifiers: {rank: {code: 8}}", "no rank for reasoning, automation"),
        ("store: {kind: s3}", "store.bucket is not set"),
        ("compression: {gguf_type: Q9}", "compression.gguf_type"),
        (
            "compression: {pruning: {schedule: [0.3, 0.2]}}",
            "pruning: the schedule [0.3, 0.2] does not rise",
        ),
        ("compression: {pruning: {sparsity_attention: 1.0}}", "compression.pruning.sparsity_attention"),
        ("compression: {awq: {rounding: down}}", "compression.awq.rounding"),
        ("strategy: {families: [gdc]}", "no strategy family 'gdc': did you mean 'gcd'"),
        ("[1, 2]", "holds no mapping"),
        ("a: [", "is not YAML"),
        ("{seed: x, humaneval_problems: 165}", "and 1 more"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(CogumiError) as caught:
        load_profile(write(tmp_path, text))
    assert problem in caught.value.problem
    assert caught.value.mend


def test_a_missing_profile_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1")
    with pytest.raises(CogumiError, match="there is no profile 'mina'") as caught:
        load_profile(tmp_path / "mina.yaml")
    assert caught.value.mend == "did you mean 'mine'?"


def test_profiles_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Profile(name="x").seed = 3  # type: ignore[misc]


def test_answers_have_the_room_of_a_strategy_s_teacher_that_is_a_model() -> None:
    strategy = {"teacher": "local"}
    assert Profile(name="x").taught_tokens == 0, "the cascade's local answers that are longer are not kept"
    assert Profile.model_validate({"name": "x", "strategy": strategy}).taught_tokens == 192


def test_a_setting_that_came_later_is_no_part_of_a_configuration_while_off() -> None:
    """Or a new version would make all again that was trained before it."""
    assert "position_skips" not in LoraConfig().model_dump(mode="json")
    on = LoraConfig(position_skips=3).model_dump(mode="json")
    assert on["position_skips"] == 3 and LoraConfig(**on).position_skips == 3
