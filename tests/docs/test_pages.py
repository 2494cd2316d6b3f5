"""What the pages point at exists: links, images, names, files, tests; and what they tell to type parses."""

import importlib
import re

import pytest

from preln.base.errors import InputError
from preln.heal import get_recipe
from preln.options import build_parser
from preln.probe import MEASURES
from preln.prune import CRITERIA, HALF_METRICS, PRESETS, REPLACEMENTS

from .pages import ROOT, SPAN, anchors, blocks, commands, links, pages, prose

TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}
NAME = re.compile(r"preln(?:\.\w+)+")
TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


def broken_links(name, text):
    """Relative targets that lead nowhere; a page whose generated parts are still empty may lack pictures."""
    found = []
    unfilled = re.search(r"<!-- (\S+):begin -->\s*<!-- \1:end -->", text) is not None
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        if not place.exists():
            if not (unfilled and place.suffix == ".png"):
                found.append(target)
        elif anchor and anchor not in anchors(place.read_text(encoding="utf-8")):
            found.append(target)
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_picture_is_there(name):
    assert broken_links(name, TEXTS[name]) == []


def test_a_link_that_leads_nowhere_is_seen():
    page = "# Here\n\n[a](gone.md) ![b](gone.png) [c](tour.md#gone) [d](#here) [e](https://example.org)\n"
    assert broken_links("docs/x.md", page) == ["gone.md", "gone.png", "tour.md#gone", "#here"]
    assert (
        broken_links("docs/tour.md", "[a](traps.md) [b](../README.md#limits) [c](../theory/norms.md)") == []
    )
    assert links("`[no](link.md)`\n```\n[no](link.md)\n```\n[a\nb](yes.md)") == ["yes.md"]


def wrong_command(words, mentioned):
    """What the real parser, or a registry, says against the words behind ``preln``; None where all is well.

    Running text may leave out what is required.
    """
    parser = build_parser("0")
    verbs = parser._subparsers._group_actions[0].choices
    if len(words) <= 1 or "…" in words:  # a verb by its name
        return None if not words or words[0] in verbs or words[0].startswith("-") else f"no verb {words[0]}"
    for action in verbs[words[0]]._actions if mentioned and words[0] in verbs else ():
        action.required = False
        if not action.option_strings:
            action.nargs = "*"
    try:
        given = parser.parse_args(words)
    except SystemExit as stop:
        return "the parser refuses it" if stop.code else None
    return next(filter(None, (_unknown(given, words), _not_there(given))), None)


def _unknown(given, words):
    """A name in the command that no registry knows."""
    metrics = f"{getattr(given, 'metric', None) or ''},{getattr(given, 'metrics', None) or ''}"
    for name in filter(None, metrics.split(",")):
        known = name in ("all", "M", *HALF_METRICS) or name.partition("@")[0] in (*CRITERIA, *HALF_METRICS)
        if not known:
            return f"no metric {name}"
    groups = ("stream", "updates", "gradients", "norms", "jacobians", "lens", "all")
    for name in (getattr(given, "measures", None) or "").split(","):
        if name and name not in (*MEASURES, *groups):
            return f"no measure {name}"
    for name in (getattr(given, "recipe", None) or "").split(","):
        try:
            get_recipe(name) if name and name != "NAME" else None
        except InputError:
            return f"no recipe {name}"
    if getattr(given, "protect", "none") not in (*PRESETS, "PRESET"):
        return f"no protection {given.protect}"
    if getattr(given, "method", "remove") not in ("remove", *REPLACEMENTS):
        return f"no method {given.method}"
    return None


def _not_there(given):
    """A study or a ledger of this repository that is not there; names without a folder are the reader's."""
    for path in (getattr(given, "study", None), *(getattr(given, "ledger", None) or ())):
        if (
            isinstance(path, str)
            and path.startswith(("experiments/", "docs/"))
            and not (ROOT / path).is_file()
        ):
            return f"no file {path}"
    return None


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_line_is_one_that_preln_takes(name):
    wrong = {" ".join(words): wrong_command(words, mentioned) for words, mentioned in commands(TEXTS[name])}
    assert {line: why for line, why in wrong.items() if why} == {}


def test_running_text_may_leave_out_what_is_required():
    assert wrong_command(["heal", "--shard", "on"], True) is None
    assert wrong_command(["heal", "--shard", "on"], False) == "the parser refuses it"


def test_enough_command_lines_are_found():
    assert sum(len(list(commands(text))) for text in TEXTS.values()) > 25


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("preln prune MODEL --metric reverse --drops 8 --out small", "the parser refuses"),
        ("preln heal small --data text.jsonl", "the parser refuses"),
        ("preln cure small", "the parser refuses"),
        ("`preln cure` it", "no verb cure"),
        ("`preln score --tokens 8` it", "the parser refuses"),
        ("`preln heal --shard always` it", "the parser refuses"),
        ("`preln cure --shard on` it", "the parser refuses"),
        ("preln score MODEL --metrics all,guess", "no metric guess"),
        ("preln heal small --recipe partial-0 --out healed", "no recipe partial-0"),
        ("preln probe MODEL --measures stream,guess", "no measure guess"),
        ("preln prune MODEL --metric reverse --drop 1 --protect mine", "no protection mine"),
        ("preln prune MODEL --method melt --drop 1 --out small", "no method melt"),
        ("preln run experiments/gone.yaml", "no file experiments/gone.yaml"),
        ("preln run mine.yaml && preln report runs/mine --colour", "the parser refuses"),
        ("preln verify \\\n    --profiles quick", "the parser refuses"),
    ],
)
def test_a_command_line_that_would_fail_is_seen(line, complaint):
    page = f"Use {line}.\n" if line.startswith("`") else f"```bash\n{line}   # a remark\n```\n"
    found = [why for words, mentioned in commands(page) if (why := wrong_command(words, mentioned))]
    assert len(found) == 1
    assert complaint in found[0]


def missing_names(text):
    """Dotted names of the package in code that do not resolve."""
    code = [*SPAN.findall(prose(text)), *(b.text for b in blocks(text) if b.language in ("python", "pycon"))]
    return sorted({name for part in code for name in NAME.findall(part) if not resolves(name)})


def resolves(name):
    """Whether a dotted name leads to a module or to something in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


NEW = ("tour", "traps", "extend", "api")


@pytest.mark.parametrize("name", [f"docs/{name}.md" for name in NEW if f"docs/{name}.md" in TEXTS])
def test_every_name_file_and_test_that_a_page_speaks_of_is_there(name):
    text = TEXTS[name]
    shown = {block.title for block in blocks(text)}  # files that the page itself holds
    made_up = tuple(path[4:-3].replace("/", ".") for path in shown if path and path.startswith("src/"))
    assert [n for n in missing_names(text) if not made_up or not n.startswith(made_up)] == []
    for path, test in TEST.findall(text):
        if path in shown:
            continue
        assert (ROOT / path).is_file(), path
        if test:
            assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), test


def test_a_name_that_is_gone_is_seen():
    page = "`preln.prune.score` and `preln.prune.scored`, and\n\n```python\npreln.evaluate.nothing()\n```\n"
    assert missing_names(page) == ["preln.evaluate.nothing", "preln.prune.scored"]
    assert not resolves("preln.nowhere.name")


def test_the_make_targets_that_pages_name_exist():
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {t for text in TEXTS.values() for t in re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.M)}
    assert named and named <= known
    assert "melt" not in known
