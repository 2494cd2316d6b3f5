"""English prose that is on every machine: the documentation inside the installed numpy and scipy."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from preln.base.errors import InputError
from preln.base.progress import track

PACKAGES = ("numpy", "scipy")
SHORTEST = 400  # characters; below that a docstring is a signature and a sentence

_SUBSTANTIAL = re.compile(rb"(\"\"\"|''').{%d,}?\1" % SHORTEST, re.DOTALL)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_versions() -> dict[str, str]:
    """The versions that fix the text, as ``{"numpy": "2.4.6", "scipy": "1.17.1"}``."""
    return {name: version(name) for name in PACKAGES}


@lru_cache(maxsize=1)
def docstring_documents() -> tuple[str, ...]:
    """Every distinct substantial docstring of numpy and scipy, sorted, read without importing them.

    The installed source files are parsed, never run, so the result depends on the two versions only. The
    documentation of routines implemented in C is found too: both packages attach it by calls such as
    ``add_newdoc("name", "text")``. Test folders are left out, and the same text is kept once.

    Returns:
        The documents, each at least ``SHORTEST`` characters, in lexicographic order.

    Raises:
        InputError: A package is not installed as source files.
    """
    found: set[str] = set()
    for package in PACKAGES:
        files = _source_files(package)
        for path in track(files, label=f"documentation of {package}", total=len(files)):
            content = path.read_bytes()
            # parsing is most of the cost, and two files in three hold no long text at all
            if _SUBSTANTIAL.search(content):
                found.update(_texts(ast.parse(content)))
    return tuple(sorted(text for text in found if len(text) >= SHORTEST))


def _source_files(package: str) -> list[Path]:
    """The package's Python files less its tests, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"docstrings: {package} has no source files here: install it, or name a text file")
    root = Path(spec.origin).parent
    return sorted(p for p in root.rglob("*.py") if "tests" not in p.relative_to(root).parts)


def _texts(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module, of its classes and functions, and those attached by ``add_newdoc``."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        body: list[ast.stmt] = getattr(node, "body", [])
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text.strip()
        if isinstance(node, _FUNCTIONS):
            continue  # what is nested in a function is an implementation detail
        for child in body:
            if isinstance(child, (ast.ClassDef, *_FUNCTIONS, ast.If, ast.Try)):
                pending.append(child)
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                yield from _attached(child.value)


def _attached(call: ast.Call) -> Iterator[str]:
    """The long literal strings among the arguments of an ``add_newdoc``-like call."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if "newdoc" not in name and "docs" not in name:
        return
    for argument in call.args:
        parts = argument.elts if isinstance(argument, ast.Tuple) else [argument]
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield inspect.cleandoc(part.value).strip()
