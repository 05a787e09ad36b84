import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.planning.shapes import (
    STUDENTS,
    find_student,
    presets,
    read_folder,
    shape_of_config,
    student_of,
)
from cogumi_dagster.lib.profile import StudentConfig, read_profile
from cogumi_dagster.lib.training.student import StudentReport

ENTRIES = yaml.safe_load(STUDENTS.read_text())["students"]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_presets_count_as_many_parameters_as_their_makers(name: str) -> None:
    assert presets()[name].parameters == ENTRIES[name]["parameters"]


def test_presets_are_those_that_are_promised() -> None:
    assert set(presets()) == {
        "Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.2-3B", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen3-0.6B", "Qwen3-1.7B",
        "SmolLM2-135M", "SmolLM2-360M", "SmolLM2-1.7B",
    }  # fmt: skip
    assert [shape.parameters for shape in presets().values()] == sorted(e["parameters"] for e in ENTRIES.values())


@pytest.mark.parametrize("fixture", ["student", "untied_student"])
def test_a_folder_is_read_from_its_config_alone(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint = request.getfixturevalue(fixture)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    shape = read_folder(tmp_path)
    with safe_open(checkpoint / "model.safetensors", "np") as file:
        assert shape.tensors == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shape.pretraining_tokens is None
    assert shape.parameters == sum(map(prod, shape.tensors.values()))
    assert shape.linear_parameters == shape.parameters - sum(
        prod(size) for name, size in shape.tensors.items() if "proj" not in name
    )


def test_a_random_student_is_known_before_it_is_drawn(imported: tuple[Path, StudentReport]) -> None:
    config = StudentConfig(name="tiny", source="random:2x64")
    assert student_of(config).tensors == read_folder(imported[0]).tensors
    assert student_of(config).parameters == imported[1].parameters


@pytest.mark.parametrize("profile", ["tiny", "quick", "local", "gpu", "cluster"])
def test_every_profile_s_student_can_be_planned_for(profile: str) -> None:
    assert student_of(read_profile(profile).student).parameters > 0


@pytest.mark.parametrize(
    "wanted",
    ["Qwen3-0.6B", "qwen3-0.6b", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B-Instruct", "Meta-Llama-3.1-8B-Instruct"],
)
def test_a_student_is_found_as_people_call_it(wanted: str) -> None:
    assert find_student(wanted).name.lower() in wanted.lower()


def test_a_copy_of_a_known_student_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ENTRIES["Qwen3-0.6B"]["config"] | {"torch_dtype": "bfloat16"}))
    assert find_student(str(tmp_path)).pretraining_tokens == 36e12


def test_an_unknown_student_brings_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CogumiError) as error:
        find_student("Qwen/Qwen3-0.6")
    assert "there is no student 'Qwen/Qwen3-0.6'" in error.value.problem
    assert error.value.mend == "name a known one (did you mean 'Qwen3-0.6B'?), or give a checkpoint's folder"
    with pytest.raises(CogumiError, match="is not a checkpoint"):
        find_student(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CogumiError, match="is not JSON"):
        find_student(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' cannot be planned for"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"intermediate_size": True}, "intermediate_size is True"),
        ({"num_key_value_heads": 3}, "4 heads of 16 with 3 key-value heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "do not fit"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CogumiError) as error:
        shape_of_config("x", LLAMA | changes, where="there/config.json")
    assert problem in error.value.problem and "there/config.json" in error.value.problem
    assert error.value.mend


def test_a_llama_with_biases_counts_them() -> None:
    plain, biased = shape_of_config("x", LLAMA), shape_of_config("x", LLAMA | {"attention_bias": True})
    assert biased.parameters - plain.parameters == 2 * (64 + 32 + 32 + 64)
