"""Write the reference of the public names: `python docs/build_api.py [FOLDER]`, by default `build/api`.

One Markdown page a room, from signatures and docstrings, and one for the command line. The pages are built
when they are wanted and not kept: a docstring is mended in one place, and no second copy goes stale.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOMS = (
    *("closed_form", "theory", "linops", "models", "data", "probe"),
    *("prune", "heal", "evaluate", "experiment", "report", "testing"),
)
DEEPER = {
    "prune": ("registry.criterion", "registry.Ranked", "evidence.Request", "replace.registry.replacement"),
    "testing": ("verify.verify",),
}
"""What people are told to use that a room keeps one module deeper."""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Note|Notes):$")
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(.*?\))?: (.*)$")
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def signature(name: str, thing: Any) -> str:
    """`name(...) -> ...`, one parameter a line where it is long; annotations as they stand in the source."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    parts, star = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls") and not parts:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        sign = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = f"{sign}{parameter.name}{_annotation(parameter.annotation, ': ')}"
        if parameter.default is not parameter.empty:
            equals = "=" if parameter.annotation is parameter.empty else " = "
            text += equals + _default(thing, parameter)
        parts.append(text)
    back = "" if inspect.isclass(thing) else _annotation(found.return_annotation, " -> ")
    line = f"{name}({', '.join(parts)}){back}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){back}"


def _annotation(found: Any, before: str) -> str:
    if found is inspect.Signature.empty or found is None:
        return ""
    return before + (found if isinstance(found, str) else inspect.formatannotation(found))


def _default(thing: Any, parameter: inspect.Parameter) -> str:
    """A default as one would type it; a dataclass's factory by what it makes."""
    if is_dataclass(thing):
        made = {f.name: f.default_factory for f in fields(thing) if f.default_factory is not MISSING}
        if parameter.name in made:
            return repr(made[parameter.name]())
    return repr(parameter.default)


def markdown(docstring: str) -> str:
    """A Google docstring as Markdown: sections as lists, examples fenced, references as code."""
    lines: list[str] = []
    example, inside = False, False
    for line in inspect.cleandoc(docstring).splitlines():
        text = line.strip()
        if example and not text:
            lines.append("```")
            example = False
        if text.startswith(">>>") and not example:
            lines += ["", "```pycon"]
            example = True
        if example:
            lines.append(line)
            continue
        text = ROLE.sub(r"`\1`", text).replace("``", "`")
        section = SECTION.match(text)
        if section and not line.startswith(" "):
            lines += ["", f"**{section[1]}**", ""]
            inside = True
        elif inside and text and (entry := ENTRY.match(text)) and len(line) - len(line.lstrip()) == 4:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif inside and text and line.startswith(" "):
            lines.append(f"  {text}" if lines[-1].startswith(("- ", "  ")) else text)
        else:
            inside = inside and not text
            lines.append(text)
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, *(["```"] if example else [])])).strip()


def public(room: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public names of a room and what they are, those from deeper down last."""
    for name in room.__all__:
        yield name, getattr(room, name)
    for path in DEEPER.get(room.__name__.rpartition(".")[2], ()):
        module, _, name = path.rpartition(".")
        yield path, getattr(importlib.import_module(f"{room.__name__}.{module}"), name)


def members(kind: type) -> Iterator[tuple[str, Any, str]]:
    """The public methods and properties that a class defines itself: name, function, what it is."""
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function, "property" if isinstance(member, property) else "method"


def described(place: str, name: str, thing: Any) -> str:
    """The section of one name.

    Raises:
        ValueError: A function, class, method or property without a docstring.
    """
    parts = [f"## {name}"]
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        entries = list(thing) if isinstance(thing, dict | tuple | list | frozenset) else [thing]
        listed = ", ".join(f"`{entry}`" for entry in map(str, entries))
        return f"{parts[0]}\n\n{type(thing).__name__}: {listed}"
    if not thing.__doc__ or thing.__doc__.startswith(f"{thing.__name__}("):  # dataclasses write that one
        raise ValueError(f"{place}.{name}: has no docstring")
    parts += [f"```python\n{signature(name.rpartition('.')[2], thing)}\n```", markdown(thing.__doc__)]
    for member, function, kind in members(thing) if inspect.isclass(thing) else ():
        if not function.__doc__:
            raise ValueError(f"{place}.{name}.{member}: has no docstring")
        shown = member if kind == "property" else signature(member, function)
        parts += [f"### {name}.{member}", f"```python\n{shown}\n```", markdown(function.__doc__)]
    return "\n\n".join(parts)


def commands() -> str:
    """The page of the command line: every verb with its help."""
    import argparse

    import preln
    from preln.options import build_parser

    parser = build_parser(preln.__version__)
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    former = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"  # what argparse wraps its help at
    try:
        parts = ["# The command line", f"```text\n{parser.format_help()}```"]
        parts += [f"## preln {name}\n\n```text\n{verb.format_help()}```" for name, verb in verbs.items()]
    finally:
        del os.environ["COLUMNS"]
        if former is not None:
            os.environ["COLUMNS"] = former
    return "\n\n".join(parts) + "\n"


def build(folder: Path) -> list[Path]:
    """Write every page; the same package gives the same bytes.

    Raises:
        ValueError: A public name without a docstring, or one whose text holds an address in memory.
    """
    import preln
    from preln.theory import registry

    registry()  # the built-in claims, which register as they are imported
    pages = {"cli.md": commands()}
    index = ["# preln: reference", f"Version {preln.__version__}. [The command line](cli.md), and the rooms:"]
    for room in ROOMS:
        module = importlib.import_module(f"preln.{room}")
        names = list(public(module))
        sections = [described(module.__name__, name, thing) for name, thing in names]
        head = f"# {module.__name__}\n\n{markdown(module.__doc__ or '')}"
        pages[f"{room}.md"] = "\n\n".join([head, *sections]) + "\n"
        index.append(f"- [{module.__name__}]({room}.md): {', '.join(f'`{name}`' for name, _ in names)}")
    short = ", ".join(f"`preln.{name}` ({home})" for name, home in sorted(preln._EXPORTS.items()))
    index.append(
        f"Also under the package's own name: {short}. `probe`, `prune`, `heal` and `evaluate` can be called."
    )
    pages["index.md"] = "\n\n".join(index) + "\n"
    for name, text in pages.items():
        if address := re.search(r".* at 0x[0-9a-f]+.*", text):
            raise ValueError(f"{name}: {address[0].strip()!r} holds an address in memory")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(folder / name for name in pages)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
    written = build(target)
    print(f"{len(written)} pages: {target / 'index.md'}")
