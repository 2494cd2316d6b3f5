from __future__ import annotations

import gzip
import json
import time

import pytest

from preln.base.errors import InputError
from preln.data import describe, documents, list_sources, load_tokens
from preln.data.docstrings import SHORTEST, docstring_documents
from preln.data.hub import hub_disabled, hub_reachable
from preln.models import tiny_tokenizer


def _write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_docstrings_are_substantial_distinct_sorted_and_quickly_found():
    docstring_documents.cache_clear()
    started = time.process_time()
    found = docstring_documents()
    seconds = time.process_time() - started
    assert len(found) > 1000
    assert list(found) == sorted(set(found))
    assert min(map(len, found)) >= SHORTEST
    assert seconds < 20  # about 4 on an idle laptop core; the bound only catches a runaway walk


def test_docstrings_include_python_and_c_routines():
    import inspect

    import numpy as np
    import scipy.optimize

    found = set(docstring_documents())
    assert inspect.cleandoc(scipy.optimize.minimize.__doc__).strip() in found
    # numpy.nonzero-like C routines get theirs by add_newdoc; the interpreter shows the same words
    words = "Return a new array of given shape and type, without initializing entries."
    assert words in np.empty.__doc__
    assert any(words in text for text in found)


def test_documents_inside_functions_and_tests_are_left_out(tmp_path, monkeypatch):
    import sys

    long = "prose " * 100
    package = tmp_path / "toy_package"
    (package / "tests").mkdir(parents=True)
    body = (
        f'"""Module {long}"""\ndef f():\n    """Outer {long}"""\n    def g():\n        """Inner {long}"""\n'
    )
    body += f'class A:\n    """Class {long}"""\n    def m(self):\n        """Method {long}"""\n'
    body += (
        f'def h():\n    """short"""\nadd_newdoc("a", "x", """Attached {long}""")\nother("""Other {long}""")\n'
    )
    (package / "__init__.py").write_text(body, encoding="utf-8")
    (package / "tests" / "test_a.py").write_text(f'"""Test {long}"""', encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("preln.data.docstrings.PACKAGES", ("toy_package",))
    docstring_documents.cache_clear()
    try:
        starts = [text.split()[0] for text in docstring_documents()]
    finally:
        docstring_documents.cache_clear()
    assert starts == ["Attached", "Class", "Method", "Module", "Outer"]
    assert "toy_package" not in sys.modules  # parsed, never imported


def test_text_files_are_cut_at_blank_lines_into_documents_of_some_length(tmp_path):
    paragraphs = [f"Paragraph {n}. " + "text " * 60 for n in range(10)]
    path = _write(tmp_path / "a.txt", "\r\n\r\n".join(paragraphs))
    found = documents(path)
    assert "\n\n".join(found) == "\n\n".join(paragraphs)
    assert all(len(text) >= 1000 for text in found[:-1])
    assert len(found) == 3
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert documents(packed) == found


def test_rows_with_instructions_are_joined(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"text": "plain", "instruction": "ignored", "output": "ignored"},
    ]
    path = _write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert documents(path) == ["Add.\n\n1 2\n\n3", "Say hi.\n\nhi", "plain"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        (b'{"text": "a"}\n\n{"body": "b"}\n', r"line 3 has no string field 'text'.*body"),
        (b'{"text": "a"}\n{"text": 3}\n', "line 2 has no string field"),
        (b"[1, 2]\n", "line 1 has no string field.*list"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        (b'{"text": "\\ud800"}\n', "line 1 holds half a surrogate pair"),
        (b"", "holds no text"),
        (b'{"text": "  "}\n', "holds no text"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokens(path, tiny_tokenizer())
    assert "bad.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        documents(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="no such file or folder"):
        documents(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="not one of"):
        documents(_write(tmp_path / "a.csv", "text"))
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(InputError, match="damaged gzip"):
        documents(damaged)
    damaged.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(InputError, match="damaged gzip"):
        documents(damaged)
    with pytest.raises(InputError, match="not UTF-8"):
        documents(_write(tmp_path / "latin.txt", "caf\xe9", "latin-1"))


def test_a_source_with_too_little_text_says_how_many_windows_there_are(tmp_path):
    path = _write(tmp_path / "a.jsonl", json.dumps({"text": "short"}))
    with pytest.raises(InputError, match=r"split holds 0 windows of 128 tokens, not 8"):
        load_tokens(path, tiny_tokenizer())


def test_hub_ids_fail_quickly_when_the_hub_is_switched_off(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_disabled()
    assert not hub_reachable()
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        documents("no-such-owner/no-such-name")


def test_an_unreachable_hub_is_told_apart(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    with pytest.raises(InputError, match="hub cannot be reached"):
        documents("no-such-owner/no-such-name")


def test_a_dataset_folder_is_read_by_configuration(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    _write(folder / "a.jsonl", json.dumps({"text": "first"}) + "\n")
    _write(folder / "b.jsonl", json.dumps({"text": "second"}) + "\n")
    card = "---\nconfigs:\n"
    for name, file in (("one", "a"), ("two", "b")):
        card += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {file}.jsonl\n"
    _write(folder / "README.md", card + "---\n")
    assert documents(f"{folder}:one") == ["first"]
    assert documents(f"{folder}:two") == ["second"]
    with pytest.raises(InputError, match="cannot be loaded"):
        documents(f"{folder}:three")


def test_descriptions_say_what_fixes_the_text_and_nothing_of_the_machine(tmp_path):
    path = _write(tmp_path / "a.jsonl", json.dumps({"text": "word"}))
    told = describe(path)
    assert told["kind"] == "file"
    assert told["source"] == "a.jsonl"
    assert len(told["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(told)
    assert set(describe("docstrings")["versions"]) == {"numpy", "scipy"}
    assert describe("owner/name")["kind"] == "hub"
    with pytest.raises(InputError, match="no such file"):
        describe(tmp_path / "absent.jsonl")


def test_listed_sources_start_with_the_embedded_one():
    rows = list_sources()
    assert rows[0]["name"] == "docstrings"
    assert all({"name", "from", "needs"} <= row.keys() for row in rows)
