r"""What a write-up may say: no number typed by hand, no claim that the ledger does not bear, a clean log.

The rule for digits. In running text every digit fails; numbers come from ``\val{key}``. Digits are free in
the arguments of commands that print no number of their own (labels, references, citations, lengths, files:
``_SKIP``), in column and box specifications, in macro parameters (``#1``) and in the names of ``NAMES``.
Number words from five on fail like digits. In mathematics only the constants 0 to 4 are free, and only where
the formula has a letter: not as decimals, not after ``\approx``, ``\sim``, ``\pm`` or ``\times``, not before
``\%``, and as a whole side of a relation only 0 and 1, or after the dimension d. What this leaves open: a
result that is 0, 1 or a fraction of such constants, typed as a formula.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preln.base.errors import InputError

NAMES = (
    "SmolLM2-135M",
    "SmolLM2",
    "Llama-3.1-8B",
    "Llama-3-8B",
    "partial-3",
    "partial-2",
    "partial-1",
    "float32",
)
# command -> how many braced arguments print no number; its bracketed ones never do, but for a citation's
_SKIP = dict.fromkeys(
    ["documentclass", "usepackage", "geometry", "hypersetup", "label", "ref", "eqref", "pageref", "cite",
     "citep", "citet", "citealp", "bibliography", "bibliographystyle", "input", "includegraphics", "vspace",
     "hspace", "val", "claim", "refuted", "hyp", "newcommand", "DeclareRobustCommand", "parbox"],
    1,
) | {"setlength": 2, "addtolength": 2, "setcounter": 2, "newtheorem": 1, "\\": 0}  # fmt: skip
_BOXES = ("tabular", "tabularx", "minipage", "array", "figure", "table")
_MATH = re.compile(
    r"(?<!\\)\$\$.*?(?<!\\)\$\$|(?<!\\)\$.*?(?<!\\)\$|(?<!\\)\\\[.*?\\\]|\\\(.*?\\\)"
    r"|\\begin\{(equation|align|gather|multline)\*?\}.*?\\end\{\1\*?\}",
    re.DOTALL,
)
_WORDS = re.compile(
    r"\b(?:five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty|thirty"
    r"|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?|billions?)\b",
    re.IGNORECASE,
)
_RELATION = r"(?:=|<|>|\\leq?\b|\\geq?\b|\\ll\b|\\gg\b|\\neq?\b)"
_BARE = re.compile(
    rf"(\S)\s*{_RELATION}\s*([2-4])\s*(?=$|[$,;.)&=<>]|\\(?:[\\,;! \])]|q?quad|text|\w*q\b|iff|end|end\b))"
)


@dataclass(frozen=True)
class Index:
    """What the generated files hold: values by key, and the status of every theorem and hypothesis by ID."""

    values: Mapping[str, str]
    theorems: Mapping[str, str]
    hypotheses: Mapping[str, str]


def read_index(folder: str | Path) -> Index:
    """The index that generating wrote.

    Raises:
        InputError: It is missing or damaged.
    """
    path = Path(folder) / "index.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Index(found["values"], found["theorems"], found["hypotheses"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: run `python -m preln.report.paper generate`") from error


def check_source(path: str | Path, index: Index) -> list[str]:
    """Everything that is wrong with a TeX file and the hand-written files that it inputs, a line each.

    Args:
        path: The TeX file; `generated/` beside it is where its figures and tables come from.
        index: What may be named.

    Raises:
        InputError: The file cannot be read.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: cannot be read: check the path") from error
    text = re.sub(r"(?<!\\)%[^\n]*", lambda match: " " * len(match[0]), text)
    found = [*_named(text, index), *_digits(text), *_typed(text, index)]
    problems = [f"{source}:{text.count(chr(10), 0, at) + 1}: {message}" for at, message in sorted(found)]
    for match in re.finditer(r"\\(input|includegraphics)(?:\[[^]]*\])?\{([^{}#]+)\}", text):
        target = source.parent / match[2]
        if not target.is_file():
            line = text.count("\n", 0, match.start()) + 1
            problems.append(
                f"{source}:{line}: {match[2]}: there is no such file: generate it or mend the name"
            )
        elif match[1] == "input" and not match[2].startswith("generated/"):
            problems += check_source(target, index)
    return problems


def _named(text: str, index: Index) -> Iterator[tuple[int, str]]:
    r"""Keys of ``\val`` and IDs of ``\claim``, ``\refuted`` and ``\hyp`` that do not bear their use."""
    for match in re.finditer(r"\\(val|claim|refuted|hyp)\{([^{}#]*)\}", text):
        kind, name = match[1], match[2]
        if kind == "val":
            if name not in index.values:
                yield match.start(), f"\\val{{{name}}}: no result has this key: see generated/numbers.tex"
        elif kind == "hyp":
            if name not in index.hypotheses:
                yield match.start(), f"\\hyp{{{name}}}: no stored verdict: run a study that decides it"
        else:
            need, status = {"claim": "proved", "refuted": "refuted"}[kind], index.theorems.get(name)
            if status is None:
                yield match.start(), f"\\{kind}{{{name}}}: not in the ledger: use an ID that it holds"
            elif status != need:
                yield match.start(), f"\\{kind}{{{name}}}: {status} in the ledger, the text needs {need}"


def _typed(text: str, index: Index) -> Iterator[tuple[int, str]]:
    """IDs written out by hand, whose status nothing would check."""
    masked = _masked(text)
    for name in {*index.theorems, *index.hypotheses}:
        for match in re.finditer(rf"(?<![\w-]){re.escape(name)}(?![\w-])", masked):
            yield match.start(), f"{name}: an ID typed by hand: use \\claim, \\refuted or \\hyp"


def _digits(text: str) -> Iterator[tuple[int, str]]:
    """Numbers typed by hand."""
    prose, masked = list(_masked(text)), _masked(text)
    for match in _MATH.finditer(text):
        start, end = match.span()
        # words inside a formula follow the rule of running text
        words = [(m.start(), m.end()) for m in re.finditer(r"\\(?:text|mbox)\{[^{}]*\}", masked[start:end])]
        formula = list(masked[start:end])
        for a, b in words:
            formula[a:b] = " " * (b - a)
        yield from ((start + at, message) for at, message in _formula("".join(formula)))
        for at in range(start, end):
            if not any(a <= at - start < b for a, b in words):
                prose[at] = "\n" if prose[at] == "\n" else " "
    left = "".join(prose)
    for match in re.finditer(r"(?<!#)\d[\d.,]*(?:\s*\\%)?", left):
        yield match.start(), _say(match[0])
    for match in _WORDS.finditer(left):
        yield match.start(), _say(match[0])


def _formula(text: str) -> Iterator[tuple[int, str]]:
    """Numbers in a formula that are no constants of mathematics."""
    letters = re.sub(
        r"\\(?:[,;:! %$\[\]()]|[a-zA-Z]*(?:approx|sim|pm|times|cdot|l?eq?|g?eq?|left|right))", " ", text
    )
    bare = not re.search(r"[A-Za-z]", letters)
    wrong: dict[int, str] = {}
    for match in re.finditer(r"(?<!#)\d+(?:\.\d+)*", text):
        number, before, after = match[0], text[: match.start()], text[match.end() :]
        glued = re.search(r"\d(?:\\[,;:! ]|\s|\{[,.]\})+$", before) is not None
        estimate = re.search(r"(?:\\(?:approx|sim|simeq|pm|mp|times|cdot)|\.)\s*$", before) is not None
        share = re.match(r"\s*\\%", after) is not None
        if bare or len(number) > 1 or int(number[0]) > 4 or glued or estimate or share:
            wrong[match.start()] = number
    for match in _BARE.finditer(text):
        if match[1] != "d":
            wrong.setdefault(match.start(2), match[2])
    yield from ((at, _say(number)) for at, number in wrong.items())


def _say(number: str) -> str:
    return f"{number.strip()!r}: a number typed by hand: take it from the results with \\val"


def _masked(text: str) -> str:
    """The text with what prints no number blanked, at the same places."""
    out = list(text)

    def blank(start: int, end: int) -> None:
        out[start:end] = ["\n" if c == "\n" else " " for c in text[start:end]]

    for match in re.finditer(r"\\([a-zA-Z]+|\\)\*?", text):
        name = match[1]
        if name in ("begin", "end"):
            inside = re.compile(r"\{(\w+)\*?\}").match(text, match.end())
            braces = 1 if inside and inside[1] in _BOXES and name == "begin" else 0
            at = inside.end() if inside else match.end()
            blank(match.end(), at)
            if inside is None or inside[1] not in _BOXES:
                continue
            if inside[1] in ("figure", "table"):
                braces = 0
        elif name in _SKIP:
            braces, at = _SKIP[name], match.end()
        else:
            continue
        while at < len(text):
            opening = text[at]
            if opening == "[" or (opening == "{" and braces > 0):
                end = _closing(text, at)
                if opening == "{" or not name.startswith("cite"):  # a citation's remark is printed
                    blank(at, end)
                braces -= opening == "{"
                at = end
            else:
                break
    for match in re.finditer(r"\\renewcommand\{\\\w+fraction\}\{[.\d]+\}", text):  # where floats may go
        blank(match.start(), match.end())
    masked = "".join(out)
    for known in NAMES:
        masked = re.sub(rf"(?<![\w.]){re.escape(known)}(?![\w.]*\d)", " " * len(known), masked)
    return masked


def _closing(text: str, at: int) -> int:
    """Where the bracket that opens at a place ends."""
    pair = {"[": "]", "{": "}"}[text[at]]
    depth = 0
    for place in range(at, len(text)):
        if text[place] in (text[at], pair) and text[place - 1] != "\\":
            depth += 1 if text[place] == text[at] else -1
            if depth == 0:
                return place + 1
    return len(text)


def check_log(path: str | Path, *, most: float = 5.0) -> list[str]:
    """Undefined references and citations, labels defined twice, boxes that stick out by over `most` points.

    Args:
        path: The log of LaTeX, written with long lines (``max_print_line=1000``).
        most: Points.

    Raises:
        InputError: The log cannot be read.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}): build the paper first") from error
    problems = []
    for line in lines:
        box = re.match(r"Overfull \\[hv]box \(([\d.]+)pt too", line)
        if (box and float(box[1]) > most) or re.search(
            r"^(?:LaTeX|Package \w+) Warning: .*(?:undefined|multiply.defined)|^Missing character|^! ", line
        ):
            problems.append(f"{source}: {line.strip()}")
    return problems
