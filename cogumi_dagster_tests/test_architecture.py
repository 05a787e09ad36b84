"""Which room may know which: read from the source, so that nothing has to be imported."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_MODULE = 600

MAY_IMPORT = {
    "definitions": {"defs", "resources", "lib"},
    "defs": {"defs", "resources", "lib"},
    "resources": {"resources", "lib"},
    "lib": {"lib"},
    "commands": {"commands", "definitions", "defs", "resources", "lib", "home"},
    "cli": {"commands", "resources", "lib", "home"},
    "home": {"lib"},
}
"""Room -> the rooms of ours that it may import, anywhere in a module. All but ``commands`` and ``cli`` run one way:
definitions, defs, resources, lib."""
EXCEPTIONS = {("cogumi_dagster/defs/pipeline.py", "definitions")}
"""``full_pipeline_job`` drives runs of the whole code location, so its op loads it, when it runs."""
TEACHERS = {"openai", "groq", "together", "anthropic"}
MODELS = {"torch", "transformers"}
HEAVY = (
    MODELS | TEACHERS | {"ray", "peft", "datasets", "sklearn", "sentence_transformers", "llmcompressor", "xllamacpp"}
)

SOURCES = sorted([*(ROOT / "cogumi_dagster").rglob("*.py"), *(ROOT / "resources").rglob("*.py")])
NAMES = [path.relative_to(ROOT).as_posix() for path in SOURCES]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def room(name: str) -> str:
    parts = Path(name).with_suffix("").parts
    return parts[1] if parts[0] == "cogumi_dagster" and len(parts) > 1 else parts[0]


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of the modules that these statements import; ``from a import b`` may be the module a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_module_level(module: ast.Module) -> Iterator[ast.AST]:
    """Statements that run on import: not in functions, not under ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = [module]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))


def rooms_of(names: Iterator[str]) -> set[str]:
    found = set()
    for name in names:
        first, *rest = name.split(".")
        if first == "resources":
            found.add("resources")
        elif first == "cogumi_dagster" and rest:
            found.add(rest[0])
    return found


def test_the_search_sees_the_whole_house() -> None:
    assert {room(name) for name in NAMES} == {*MAY_IMPORT, "__init__"}
    assert rooms_of(imported(ast.walk(ast.parse("from cogumi_dagster import home\nimport resources.compute")))) == {
        "home", "resources",
    }  # fmt: skip
    late = ast.parse(
        "def f():\n import torch\nif TYPE_CHECKING:\n import ray\nelse:\n import groq\nclass A:\n import os"
    )
    assert set(imported(at_module_level(late))) == {"groq", "os"}


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name: str) -> None:
    found = rooms_of(imported(ast.walk(tree(name))))
    allowed = MAY_IMPORT.get(room(name), set()) | {other for path, other in EXCEPTIONS if path == name}
    assert found <= allowed, f"{name} imports {sorted(found - allowed)}"
    loaded = rooms_of(imported(at_module_level(tree(name))))
    assert loaded <= MAY_IMPORT.get(room(name), set()), "an exception holds inside a function only"


@pytest.mark.parametrize("name", [name for name in NAMES if room(name) == "lib"])
def test_lib_is_pure(name: str) -> None:
    found = {module.split(".")[0] for module in imported(ast.walk(tree(name)))}
    assert not found & {"dagster", "dagster_aws", "dagster_graphql", "resources"}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_heavy_is_loaded_with_a_module(name: str) -> None:
    banned = MODELS if room(name) == "lib" else HEAVY
    found = {module.split(".")[0] for module in imported(at_module_level(tree(name)))}
    assert not found & banned, f"{name} imports {sorted(found & banned)} at module level"


@pytest.mark.parametrize("name", [name for name in NAMES if room(name) == "defs"])
def test_modules_that_declare_assets_keep_their_annotations(name: str) -> None:
    """``from __future__ import annotations`` breaks Dagster's reading of context and config parameters."""
    assert "__future__" not in set(imported(ast.walk(tree(name))))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_fits_in_the_head(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE
