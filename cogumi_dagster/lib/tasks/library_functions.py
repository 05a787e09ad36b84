"""Short functions of installed libraries, with the examples of their docstrings, as material for code tasks.

Sources: more-itertools (MIT), toolz (BSD-3-Clause), boltons (BSD-3-Clause), read as they are installed. A function
is kept when its text runs alone (builtins and standard library only) and when that text, without the
docstring, gives exactly the values of its examples. Only library code is executed here, never a model's.
"""

import ast
import builtins
import dis
import doctest
import importlib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.sandbox import same

LIBRARIES = {
    "more_itertools.recipes": "MIT",
    "more_itertools.more": "MIT",
    "toolz.itertoolz": "BSD-3-Clause",
    "toolz.dicttoolz": "BSD-3-Clause",
    "toolz.functoolz": "BSD-3-Clause",
    "boltons.iterutils": "BSD-3-Clause",
    "boltons.strutils": "BSD-3-Clause",
    "boltons.mathutils": "BSD-3-Clause",
    "boltons.statsutils": "BSD-3-Clause",
}
_UNFIT = {"random", "time", "os", "sys", "threading", "uuid", "inspect", "warnings"}
"""Modules that make a function depend on more than its arguments."""
LONGEST_BODY = 16
"""Lines. Longer functions leave a small student no chance and fill its context."""
LONGEST_SOURCE = 700
"""Characters, about 230 tokens."""
LONGEST_VALUE = 80
LONGEST_DOC = 260
FURTHER = {
    f"boltons.{name}": "BSD-3-Clause"
    for name in (
        "dictutils", "fileutils", "formatutils", "funcutils", "jsonutils", "listutils", "timeutils", "typeutils",
        "urlutils",
    )
}  # fmt: skip
"""Further modules of ``further_functions``."""
SHORTEST_HEADER, LONGEST_HEADER = 60, 600
"""Characters of a header with its docstring."""
LONGEST_FURTHER = 1_000
"""Characters of a function without its docstring."""


@dataclass(frozen=True)
class Example:
    """A call, and its value as a Python literal."""

    call: str
    value: str


@dataclass(frozen=True)
class LibraryFunction:
    """One function: ``source`` runs alone and has no docstring; ``doc`` is the prose before the examples."""

    name: str
    module: str
    licence: str
    signature: str
    doc: str
    source: str
    lines: int
    """Lines of its body and of those it calls."""
    examples: tuple[Example, ...]

    @property
    def header(self) -> str:
        """Signature and docstring, with one example."""
        shown = self.examples[0]
        return _with_docstring(self.signature, f"{self.doc}\n\n>>> {shown.call}\n{shown.value}")


@dataclass(frozen=True)
class FurtherFunction:
    """A function whose text is known, but nothing that would judge another: ``header`` is signature and docstring,
    ``source`` runs alone and has no docstring."""

    name: str
    module: str
    licence: str
    header: str
    source: str


@cache
def library_functions() -> tuple[LibraryFunction, ...]:
    """All functions that fit, in the order of the libraries.

    Raises:
        CogumiError: a library is not installed.
    """
    found: dict[str, LibraryFunction] = {}
    for module_name, licence in LIBRARIES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            package = module_name.split(".")[0].replace("_", "-")
            raise CogumiError(f"the package {package} is missing", f"pip install {package}") from None
        imports = _standard_imports(module)
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType) and value.__module__ == module_name and name not in found:
                function = _read(name, value, imports, licence)
                if function is not None:
                    found[name] = function
    return tuple(found.values())


@cache
def further_functions() -> tuple[FurtherFunction, ...]:
    """Documented functions that run alone and yet are no ``library_functions``: they are longer, or their text alone
    reproduces no example."""
    judged = {function.name for function in library_functions()}
    found: dict[str, FurtherFunction] = {}
    for module_name, licence in {**LIBRARIES, **FURTHER}.items():
        module = importlib.import_module(module_name)
        imports = _standard_imports(module)
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType) and value.__module__ == module_name and name not in judged:
                texts = _header_and_source(name, value, imports)
                if texts is not None:
                    found.setdefault(name, FurtherFunction(name, module_name, licence, *texts))
    return tuple(found.values())


def _header_and_source(name: str, value: types.FunctionType, imports: dict[str, str]) -> tuple[str, str] | None:
    """The header with the first paragraphs of its docstring, and the text that runs alone, without docstrings; None
    where there is none, or too much of either."""
    parts: dict[str, str] = {}
    needed: set[str] = set()
    if name.startswith("_") or name != value.__name__ or not value.__doc__:
        return None
    if not _collect(value, imports, parts, needed):
        return None
    header = parts[name].splitlines()[0]
    first, *rest = inspect.cleandoc(value.__doc__).replace('"""', "").split("\n\n")
    text = _with_docstring(header, first)
    for paragraph in rest:
        first = f"{first}\n\n{paragraph}"
        longer = _with_docstring(header, first)
        if len(longer) > LONGEST_HEADER:
            break
        text = longer
    source = _alone(parts, needed)
    fits = SHORTEST_HEADER <= len(text) <= LONGEST_HEADER and len(source) <= LONGEST_FURTHER
    return (text, source) if fits else None


def _alone(parts: dict[str, str], needed: set[str]) -> str:
    """The imports, then the functions, as ``_collect`` found them."""
    return "\n\n\n".join(filter(None, ["\n".join(sorted(needed)), *parts.values()]))


def _with_docstring(header: str, doc: str) -> str:
    body = textwrap.indent(f'"""{doc}', "    ")
    return f'{header}\n{body}\n    """'


def _standard_imports(module: types.ModuleType) -> dict[str, str]:
    """Name -> import statement, for what a module imports from the standard library."""
    statements: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Import):
            pairs = [(alias, f"import {_alias(alias)}", alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            pairs = [(alias, f"from {node.module} import {_alias(alias)}", node.module) for alias in node.names]
        else:
            continue
        for alias, statement, origin in pairs:
            top = origin.split(".")[0]
            if top in sys.stdlib_module_names and top not in _UNFIT:
                statements[alias.asname or alias.name] = statement
    return statements


def _alias(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def _read(name: str, value: types.FunctionType, imports: dict[str, str], licence: str) -> LibraryFunction | None:
    if name.startswith("_") or name != value.__name__ or not value.__doc__ or value.__code__.co_argcount > 4:
        return None
    parts: dict[str, str] = {}
    needed: set[str] = set()
    if not _collect(value, imports, parts, needed):
        return None
    lines = sum(len(text.splitlines()) - 1 for text in parts.values())
    text = parts[name]
    source = _alone(parts, needed)
    doc = _prose(value.__doc__)
    if lines > LONGEST_BODY or len(source) > LONGEST_SOURCE or not doc:
        return None
    examples = tuple(_examples(name, value.__doc__, source))
    if not examples:
        return None
    return LibraryFunction(name, value.__module__, licence, text.splitlines()[0], doc, source, lines, examples)


def _collect(value: types.FunctionType, imports: dict[str, str], parts: dict[str, str], needed: set[str]) -> bool:
    """Gather the text of a function without its docstring, then those of the functions of its module that
    it calls, and the imports of all. False when it needs anything else."""
    name = value.__name__
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return False
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    if not node.body or len(parts) > 2:
        return False
    text = parts[name] = ast.unparse(node)
    for used in sorted(_free_names(compile(text, name, "exec")) - {name} - set(dir(builtins)) - set(parts)):
        inner = value.__globals__.get(used)
        if used in imports:
            needed.add(imports[used])
            continue
        if not isinstance(inner, types.FunctionType) or (inner.__module__, inner.__name__) != (value.__module__, used):
            return False
        if not _collect(inner, imports, parts, needed):
            return False
    return True


def _free_names(code: types.CodeType) -> set[str]:
    """Global names that a code object and those inside it read."""
    reads = {"LOAD_GLOBAL", "LOAD_NAME"}
    names = {str(step.argval) for step in dis.get_instructions(code) if step.opname in reads}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _free_names(constant)
    return names


def _examples(name: str, doc: str, source: str) -> Iterator[Example]:
    """Calls that need nothing but builtins, whose literal value the bare source reproduces."""
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)
    seen = set()
    try:
        rows = doctest.DocTestParser().get_examples(doc)
    except ValueError:
        return
    for row in rows:
        call, value = " ".join(row.source.split()), " ".join(row.want.split())
        if call in seen or not value or "..." in value or len(value) > LONGEST_VALUE or len(call) > 120:
            continue
        seen.add(call)
        try:
            expected = ast.literal_eval(value)
            used = _free_names(compile(call, name, "eval"))
            if name in used and used <= {name, *dir(builtins)} and same(eval(call, dict(space)), expected):
                yield Example(call, value)
        except Exception:
            continue  # needs an earlier line of the docstring, or raises, or is no literal


def _prose(doc: str) -> str:
    """The text before the first example, as plain words."""
    text = re.split(r">>>|::\s*$|Parameters\n|Args:|\.\. ", inspect.cleandoc(doc), maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "`").replace("*", "")
    text = " ".join(text.split())
    if len(text) > LONGEST_DOC:
        text = text[:LONGEST_DOC].rsplit(". ", 1)[0].rstrip(".") + "."
    return text.rstrip(":")
