"""A run at an address: taken from there, brought there, and never read half."""

import json
import uuid
from pathlib import Path

import pytest

from preln.base.errors import InputError
from preln.base.files import hash_tree
from preln.experiment import Engine, dry_run, read_study, run_study
from preln.experiment.mirror import MirroredStore, open_store
from preln.experiment.store import RunStore, Step

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Move to a machine of this name, with a cache of its own."""

    def move(name):
        monkeypatch.setenv("PRELN_CACHE", str(tmp_path / name))

    move("first")
    return move


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    name = uuid.uuid4().hex
    return f"memory://{name}/run" if request.param == "memory" else f"file://{tmp_path}/{name}/run"


@pytest.fixture
def study(study_values, write_yaml):
    study_values["heal"] = study_values["heal"][:1]
    study_values["heal"][0]["models"] = ["reverse-2"]
    study_values["hypotheses"] = study_values["hypotheses"][:1]
    return read_study(write_yaml(study_values))


def files(url):
    """File system and base path of an address."""
    store = MirroredStore(url)
    return store._files, store._base


def contents(url):
    """Every file at an address."""
    system, base = files(url)
    return {path.removeprefix(base).lstrip("/"): system.cat_file(path) for path in system.find(base)}


def step(name, text, needs=()):
    def work(folder, _workspace):
        (folder / "sub").mkdir()
        (folder / "sub" / "text.txt").write_text(text)
        (folder / "top.txt").write_text(text * 2)

    return Step(name, "probe", {"text": text}, needs, work)


def test_a_study_is_kept_at_its_address_and_another_machine_takes_it(study, url, machine, tmp_path):
    whole = run_study(study, tmp_path / "whole")
    first = run_study(study, url)
    assert first["run"] == url and first["ran"] == whole["ran"]
    stored = contents(url)
    local = hash_tree(first["folder"])
    assert set(stored) == {name for name in local if not name.startswith(".")}
    assert stored["score/scores.parquet"] == (tmp_path / "whole" / "score" / "scores.parquet").read_bytes()
    assert json.loads(stored["manifest.json"])["status"] == "finished"

    machine("second")
    assert {s["state"] for s in dry_run(study, url)} == {"kept"}
    assert not list(Path(open_store(url).root).glob("score"))  # a dry run takes no results
    second = run_study(study, url)
    assert second["folder"] != first["folder"] and second["ran"] == []
    assert second["verdicts"] == whole["verdicts"]
    assert hash_tree(second["folder"]) == local
    assert contents(url) == stored


def test_an_upload_that_was_cut_short_is_not_read(url, machine, monkeypatch):
    store = open_store(url)
    put = MirroredStore._put

    def cut(self, source, *names):
        if names[-1] == "top.txt":
            raise KeyboardInterrupt
        put(self, source, *names)

    monkeypatch.setattr(MirroredStore, "_put", cut)
    with pytest.raises(KeyboardInterrupt):
        store.execute(step("a", "x"))
    assert set(contents(url)) == {"a/sub/text.txt"}
    monkeypatch.setattr(MirroredStore, "_put", put)
    machine("second")
    assert not open_store(url).is_finished(step("a", "x"))
    machine("first")
    assert open_store(url).is_finished(step("a", "x"))  # and brings what is missing
    assert set(contents(url)) == {"a/sub/text.txt", "a/top.txt", "a/step.json"}
    machine("second")
    assert open_store(url).is_finished(step("a", "x"))


@pytest.mark.parametrize(("harm", "message"), [("flip", "was changed"), ("remove", "is missing")])
def test_damage_at_the_address_is_named_and_never_used(url, machine, harm, message):
    open_store(url).execute(step("a", "x"))
    system, base = files(url)
    path = f"{base}/a/sub/text.txt"
    system.pipe_file(path, b"y") if harm == "flip" else system.rm_file(path)
    machine("second")
    store = open_store(url)
    with pytest.raises(InputError, match=rf"a/sub/text\.txt: {message}") as error:
        store.is_finished(step("a", "x"))
    assert url in str(error.value) and "\n" not in str(error.value)
    assert not (store.root / "a").exists()
    with pytest.raises(InputError, match=message):
        store.gather(["a"])


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/../../evil"])
def test_a_name_that_leaves_its_folder_is_refused(url, name):
    system, base = files(url)
    system.makedirs(f"{base}/a", exist_ok=True)
    system.pipe_file(f"{base}/a/step.json", json.dumps({"inputs_hash": "0", "files": {name: "0"}}).encode())
    with pytest.raises(InputError, match="leaves its folder"):
        open_store(url).is_finished(step("a", "x"))


def test_a_record_that_is_none_is_refused(url):
    system, base = files(url)
    system.makedirs(f"{base}/a", exist_ok=True)
    for content in (b"", b"[]", b'{"files": 1}'):
        system.pipe_file(f"{base}/a/step.json", content)
        with pytest.raises(InputError, match=r"a/step\.json: not a record"):
            open_store(url).gather(["a"])


def test_another_result_is_set_aside_here_and_there(url, machine):
    open_store(url).execute(step("a", "x"))
    former = open_store(url).inputs_hash(step("a", "x"))[:12]
    machine("second")
    store = open_store(url)
    assert not store.is_finished(step("a", "y"))
    store.execute(step("a", "y"))
    stored = contents(url)
    assert stored["a/sub/text.txt"] == b"y"
    assert stored[f".superseded/a-{former}/sub/text.txt"] == b"x"
    machine("first")
    store = open_store(url)
    assert store.is_finished(step("a", "y"))
    assert (store.root / "a" / "top.txt").read_text() == "yy"
    assert (store.root / ".superseded" / f"a-{former}" / "top.txt").read_text() == "xx"


def test_what_a_step_needs_is_taken_before_it_is_asked_for(url, machine):
    open_store(url).execute(step("a", "x"))
    machine("second")
    store = open_store(url)
    with pytest.raises(InputError, match="step b is not finished"):
        store.gather(["a", "b"])
    assert (store.root / "a" / "top.txt").read_text() == "xx"
    assert store.inputs_hash(step("c", "x", ("a",))) != RunStore("nowhere").inputs_hash(
        step("c", "x", ("a",))
    )


def test_foreign_addresses_are_refused_before_anything_is_written(study, url, tmp_path):
    system, base = files(url)
    system.makedirs(base, exist_ok=True)
    system.pipe_file(f"{base}/mine.txt", b"x")
    with pytest.raises(InputError, match="holds no run"):
        run_study(study, url)
    assert set(contents(url)) == {"mine.txt"}
    system.pipe_file(f"{base}/manifest.json", b'{"study": "other"}')
    with pytest.raises(InputError, match="holds a run of 'other'"):
        run_study(study, url)


@pytest.mark.parametrize(
    ("address", "message"), [("nonsense://x/y", "nonsense"), ("http://127.0.0.1:9/x", "check the address")]
)
def test_addresses_that_cannot_be_reached_are_refused(study, address, message):
    with pytest.raises(InputError, match=message) as error:
        run_study(study, address)
    assert "\n" not in str(error.value)


def test_memory_is_no_place_for_a_cluster(study):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="lives in one process"):
        run_study(study, "memory://nowhere/run", Engine("ray"))


def test_a_folder_stays_a_folder(tmp_path):
    assert type(open_store(tmp_path)) is RunStore
    assert type(open_store("c:run")) is RunStore
