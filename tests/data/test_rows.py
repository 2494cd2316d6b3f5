from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from preln.base.errors import InputError
from preln.data import document_split, documents, load_rows

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _many(count: int = 300) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {n}.", "input": "" if n % 2 else f"as {n}", "output": f"{n}!"}
        for n in range(count)
    ]


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def test_the_splits_share_no_row_and_leave_none_out(tmp_path: Path) -> None:
    rows = [*_many(), *({"text": f"text {n}"} for n in range(100))]
    rows += [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(100)]
    path = _write(tmp_path / "a.jsonl", rows)
    parts: list[set[str]] = []
    for seed in range(2):
        train, held_out = (load_rows(path, split=split, seed=seed) for split in ("train", "validation"))
        assert sorted(map(_key, train + held_out)) == sorted(map(_key, rows))
        assert 0.04 < len(held_out) / len(rows) < 0.18
        parts.append({_key(row) for row in held_out})
    assert parts[0] == parts[1]  # by content, whatever the seed


def test_rows_fall_on_the_side_of_their_documents(tmp_path: Path) -> None:
    """Rows for training and tokens for validation, from one source, must not overlap."""
    path = _write(tmp_path / "a.jsonl", [*_many(200), *({"text": f"text {n}"} for n in range(200))])
    joined = {
        row["text"] if "text" in row else "\n\n".join(part for part in row.values() if part)
        for row in load_rows(path, split="validation")
    }
    assert joined == {text for text in documents(path) if document_split(text) == "validation"}


def test_the_order_is_that_of_the_seed_alone(tmp_path: Path) -> None:
    rows = _many()
    path = _write(tmp_path / "a.jsonl", rows)
    other = _write(tmp_path / "b.jsonl", [dict(reversed(list(row.items()))) for row in reversed(rows)])
    first = load_rows(path)
    assert first == load_rows(other)
    assert first != load_rows(path, seed=1)
    assert sorted(map(_key, first)) == sorted(map(_key, load_rows(path, seed=1)))
    assert first != [row for row in rows if row in first]  # not the file's order


@pytest.mark.parametrize("limit", [1, 7, 10_000])
def test_a_limit_takes_the_first_of_the_same_order(tmp_path: Path, limit: int) -> None:
    path = _write(tmp_path / "a.jsonl", [*_many(100), *_many(100)])  # every row twice
    assert load_rows(path, limit=limit) == load_rows(path)[:limit]


def test_a_row_keeps_the_columns_of_its_form_alone(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "c", "weight": 1}
    rows = [
        {"id": 1, **ALPACA, "text": "all of it"},
        {"instruction": "a", "output": "b", "input": None},
        {"messages": [message], "prompt": "p"},
        {"prompt": "p", "completion": "c", "text": None},
        {"text": "t", "output": "left over"},
    ]
    path = _write(tmp_path / "a.jsonl", rows * 1)
    found = [row for split in ("train", "validation") for row in _or_none(path, split)]
    wanted = [
        ALPACA,
        {"instruction": "a", "input": "", "output": "b"},
        {"messages": [{"role": "assistant", "content": "c"}]},
        {"prompt": "p", "completion": "c"},
        {"text": "t"},
    ]
    assert sorted(map(_key, found)) == sorted(map(_key, wanted))


def _or_none(path: Path, split: Any) -> list[dict[str, Any]]:
    try:
        return load_rows(path, split=split)
    except InputError:
        return []


def test_every_kind_of_file_and_folder_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**TALK, "number": n} for n in range(3)] + [
        {"messages": [{"role": "assistant", "content": str(n)}], "number": n} for n in range(60)
    ]
    plain = _write(tmp_path / "a.jsonl", rows)
    wanted = load_rows(plain)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    assert load_rows(packed) == wanted
    assert load_rows(table) == wanted
    for name, parts in {"json": [rows[:20], rows[20:]], "mixed": [rows[:30], rows[30:]]}.items():
        folder = tmp_path / name
        (folder / "deeper").mkdir(parents=True)
        _write(folder / "train-0.jsonl", parts[0])
        if name == "json":
            _write(folder / "deeper" / "1.jsonl", parts[1])
        else:
            pq.write_table(pa.Table.from_pylist(parts[1]), folder / "deeper" / "1.parquet")
        (folder / "README.md").write_text("not rows", encoding="utf-8")
        _write(folder / "test.jsonl", [{"broken": 1}])  # the rows that a model is judged on
        assert load_rows(folder) == wanted


def test_texts_of_other_sources_are_rows_too(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"{n} " + "word " * 250 for n in range(40)), encoding="utf-8")
    found = [row["text"] for split in ("train", "validation") for row in load_rows(path, split=split)]
    assert sorted(found) == sorted(documents(path))


def test_blank_lines_and_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a b"}\n\n{"text": " "}\n', encoding="utf-8")
    assert [row for split in ("train", "validation") for row in _or_none(path, split)] == [{"text": "a b"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', r"line 2: has no text under 'text' \(it holds int\): give a string"),
        ('{"instruction": "a"}\n', r"line 1: has no text under 'output' \(it is missing\): give"),
        (
            '{"instruction": "a", "input": [], "output": "b"}\n',
            r"line 1: has no text under 'input' \(it holds list\)",
        ),
        ('{"completion": "a"}\n', "line 1: has no text under 'prompt'"),
        ('{"question": "a", "answer": "b"}\n', r"line 1: .*\(it has: answer, question\): rename its columns"),
        ("{}\n", r"line 1: .*\(it has: nothing\)"),
        ("[1]\n", "line 1: is list, not a dictionary: give"),
        ("\n{'text': 1}\n", "line 2 is not JSON"),
        ('{"messages": "a"}\n', "line 1: 'messages' is no list of messages: give"),
        ('{"messages": []}\n', "line 1: 'messages' is no list of messages: give"),
        ('{"messages": ["a"]}\n', "line 1: message 0 of 'messages' has no text under 'role': give"),
        (
            '{"messages": [{"role": "user", "content": [{}]}]}\n',
            "line 1: message 0 .* no text under 'content'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            "line 1: 'messages' has no turn of .*'assistant'",
        ),
        ('{"text": "\\ud800"}\n', "line 1: holds half a surrogate pair"),
        ('{"prompt": "a", "completion": "\\ud800"}\n', "line 1: holds half a surrogate pair"),
        ("", "holds no rows: name a source with rows"),
        ("\n\n", "holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"a\.jsonl: {message}") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    for name, content, message in [
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.jsonl.gz", b"{}", "damaged gzip after line 0"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 50)[:-9], "damaged gzip"),
        ("a.parquet", b"PAR1 and nothing", "not a readable Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.csv", b"text\na\n", "not one of"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: {message}") as caught:
            load_rows(path)
        assert "\n" not in str(caught.value)
    for missing in ("b.jsonl", "b.parquet"):
        with pytest.raises(InputError, match="no such file"):
            load_rows(tmp_path / missing)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: holds no \.jsonl"):
        load_rows(tmp_path / "folder")
    _write(tmp_path / "folder" / "validation.jsonl", [ALPACA])
    with pytest.raises(InputError, match="named after another split"):
        load_rows(tmp_path / "folder")


def test_a_parquet_column_of_a_wrong_type_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: row 1: has no text under 'text' \(it holds int\)"):
        load_rows(tmp_path / "a.parquet")
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"row 1: .*\(it has: question\)"):
        load_rows(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split"),
        ({"limit": 0}, "limit"),
        ({"limit": True}, "limit"),
        ({"limit": 1.5}, "limit"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_rows(_write(tmp_path / "a.jsonl", [ALPACA]), **options)


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    row = next(row for row in _many() if document_split("\n\n".join(filter(None, row.values()))) == "train")
    with pytest.raises(InputError, match="none of its 1 rows belongs to the validation split"):
        load_rows(_write(tmp_path / "a.jsonl", [row]), split="validation")


def test_the_hub_is_refused_where_it_is_switched_off() -> None:
    with pytest.raises(InputError, match="switched off"):
        load_rows("nobody/nothing-of-this-name")


def test_a_hub_set_is_streamed_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options))
        return ({"text": f"row {n}"} for n in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("preln.data.rows.HUB_ROWS", 50)
    monkeypatch.setattr("preln.data.rows.hub_disabled", lambda: False)
    monkeypatch.setattr("preln.data.rows.hub_reachable", lambda: True)
    found = [row for split in ("train", "validation") for row in load_rows("someone/set:plain", split=split)]
    assert sorted(row["text"] for row in found) == sorted(f"row {n}" for n in range(50))
    assert asked[0] == ("someone/set", "plain", {"split": "train", "streaming": True})


def test_a_limited_read_holds_few_rows(tmp_path: Path) -> None:
    """Ten megabytes of rows, of which ten are wanted; the whole would take more than their size."""
    path = tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as target:
        for n in range(5000):
            target.write(json.dumps({"instruction": str(n), "input": "", "output": f"{n} " * 400}) + "\n")

    def peak(limit: int | None) -> int:
        tracemalloc.start()
        load_rows(path, limit=limit)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(10) < 1_000_000 < path.stat().st_size / 2 < peak(None)
