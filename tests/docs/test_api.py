"""The reference is whole, is the same every time, and its examples give what they show."""

import doctest
import importlib.util
import inspect
import io
import types

import pytest

from .pages import ROOT, blocks

ANYTHING = object()
SPEC = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(api)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return {path.name: path.read_text(encoding="utf-8") for path in api.build(folder)}


def test_every_public_name_of_every_room_has_a_section(built):
    rooms = {path.parent.name for path in (ROOT / "src" / "preln").glob("*/__init__.py")}
    assert rooms - set(api.ROOMS) == {"base"}
    for room in api.ROOMS:
        module = importlib.import_module(f"preln.{room}")
        sections = {line[3:] for line in built[f"{room}.md"].splitlines() if line.startswith("## ")}
        assert set(module.__all__) <= sections
        assert f"[preln.{room}]({room}.md)" in built["index.md"]
    assert "## verify.verify\n" in built["testing.md"]
    assert "## RMS-JAC" not in built["theory.md"] and "`RMS-JAC`" in built["theory.md"]


def test_every_verb_has_its_help(built):
    for verb in ("verify", "probe", "score", "prune", "heal", "evaluate", "run", "report", "sources"):
        assert f"## preln {verb}\n" in built["cli.md"]
    assert "--ledger PATH.py" in built["cli.md"]


def test_the_same_package_gives_the_same_bytes(built, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    again = {path.name: path.read_text(encoding="utf-8") for path in api.build(tmp_path / "more" / "api")}
    assert again == built
    assert api.os.environ["COLUMNS"] == "40"


def test_pages_are_whole_markdown(built):
    for name, text in built.items():
        assert text.count("```") == 2 * len(blocks(text)), name
        assert text.endswith("\n") and "\n\n\n\n" not in text
        assert ":func:" not in text and ":class:" not in text, name


def test_a_name_without_a_docstring_is_refused():
    def bare(x):
        return x

    class Half:
        """Has one; its method has none."""

        def method(self):
            return 1

    with pytest.raises(ValueError, match=r"room\.bare: has no docstring"):
        api.described("room", "bare", bare)
    with pytest.raises(ValueError, match=r"room\.Half\.method: has no docstring"):
        api.described("room", "Half", Half)


def test_an_address_in_memory_is_refused(tmp_path, monkeypatch):
    def function(x=ANYTHING):
        """Has a default that is another one every time."""

    room = types.SimpleNamespace(__all__=["function"], function=function, __name__="preln.room", __doc__="R.")
    monkeypatch.setattr(api, "ROOMS", ("room",))
    monkeypatch.setitem(api.sys.modules, "preln.room", room)
    with pytest.raises(ValueError, match="holds an address in memory"):
        api.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


DOCSTRING = """First line, with ``code`` and :func:`a.b`.

    Args:
        one: A thing
            in two lines.
        **more: Others.

    Returns:
        A number.

    >>> [[1,
    ...   2]]
    [[1, 2]]
    >>> print("a\\n  b")
    a
      b

    Last: no section.
    """


def test_a_docstring_becomes_lists_and_fences():
    assert api.markdown(DOCSTRING) == inspect.cleandoc(
        """First line, with `code` and `a.b`.

        **Args**

        - `one`: A thing
          in two lines.
        - `**more`: Others.

        **Returns**

        A number.

        ```pycon
        >>> [[1,
        ...   2]]
        [[1, 2]]
        >>> print("a\\n  b")
        a
          b
        ```

        Last: no section."""
    )


def test_signatures_are_as_in_the_source():
    def function(a: "int", /, b, *, c: "str | None" = None, **rest: "float") -> "list[int]":
        """Made up."""

    assert api.signature("f", function) == "f(a: int, b, *, c: str | None = None, **rest: float) -> list[int]"
    assert api.signature("f", lambda *names, key=1: None) == "f(*names, key=1)"


def examples():
    """Every example in the docstring of a public name, with the globals of its module."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for room in api.ROOMS:
        for name, thing in api.public(importlib.import_module(f"preln.{room}")):
            if inspect.isfunction(thing) or inspect.isclass(thing):
                module = inspect.getmodule(thing)
                for test in finder.find(thing, f"{room}.{name}", module, dict(vars(module))):
                    found[test.name] = test
    return found


def test_every_example_gives_what_it_shows():
    found = {name: test for name, test in examples().items() if test.examples}
    assert len(found) > 15
    said = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    for test in found.values():
        runner.run(test, out=said.write)
    assert not said.getvalue(), said.getvalue()
