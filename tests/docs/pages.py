"""Pages of the documentation, and what stands in them: blocks of code, links, command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1[ \t]*$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block: language, the name after ``title=``, the text, and the line of its first line."""

    language: str
    title: str | None
    text: str
    line: int


def pages() -> list[Path]:
    """Every page that people read."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "theory").glob("*.md")),
    ]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match[2].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(language, title[1] if title else None, match[3], line))
    return found


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of links and images outside of code."""
    return LINK.findall(SPAN.sub("", prose(text)).replace("\\", ""))


def anchors(text: str) -> set[str]:
    """What a page's headings can be linked by, as GitHub names them."""
    heads = re.findall(r"^#{1,6} +(.+?) *$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words behind ``preln`` of every command line, and whether it stands in running text."""
    lines = [
        (line, False)
        for block in blocks(text)
        if block.language in ("", "bash", "sh", "text", "console")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    lines += [(" ".join(span.split()), True) for span in SPAN.findall(prose(text))]
    for line, mentioned in lines:
        for part in re.split(r"\s(?:&&|;|\|)\s", line):
            match = re.match(r"\s*(?:\$ )?(?:accelerate launch -m preln\.cli|preln)(?: (.*))?$", part)
            if match is not None:
                yield shlex.split(match[1] or "", comments=True), mentioned
