"""What a run says while it goes on: to TensorBoard and trackio, on a terminal, and before it fills a disk."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path

import pytest

from preln.base.errors import InputError, MissingExtraError
from preln.heal import Cache, heal_model, train
from preln.heal.training.run_log import run_log
from preln.models import tiny_model

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration
TAGS = ["learning_rate", "loss/train", "loss/validation", "tokens_per_second"]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and numbers by tag, as TensorBoard itself reads them."""
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_is_given_the_history(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra log")
    rows = []
    result = train(
        tiny_model("llama"), random_tokens(), validation=random_tokens(seed=1), recipe="head",
        settings=settings(eval_every=3), log="tensorboard", log_folder=tmp_path / "log", on_row=rows.append,
    )  # fmt: skip
    history, found = result.history, events(tmp_path / "log")
    assert sorted(found) == TAGS
    for split in ("train", "validation"):
        mine = history[history["split"] == split]
        assert [step for step, _ in found[f"loss/{split}"]] == mine["step"].tolist()
        losses = [value for _, value in found[f"loss/{split}"]]
        assert losses == pytest.approx(mine["loss"].tolist(), rel=1e-6)
    last = history[history["split"] == "train"].iloc[-2:]
    speed = last["tokens"].diff().iloc[-1] / last["seconds"].diff().iloc[-1]
    assert found["tokens_per_second"][-1][1] == pytest.approx(speed, rel=1e-5)
    assert rows == history.to_dict("records")  # who listened before still does


def test_a_run_that_continues_writes_in_the_place_of_what_it_had_written(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra log")
    options = {"recipe": "head", "settings": settings(), "directory": tmp_path / "c"}
    options |= {"log": "tensorboard", "log_folder": tmp_path / "log"}

    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model("llama"), random_tokens(), on_row=stop, **options)
    assert [step for step, _ in events(tmp_path / "log")["loss/train"]] == [1, 2, 3, 4, 5]
    result = train(tiny_model("llama"), random_tokens(), **options)
    found = events(tmp_path / "log")["loss/train"]
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found] == pytest.approx(result.history["loss"].tolist(), rel=1e-6)


def test_a_stored_run_has_its_log_beside_it(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra log")
    heal_model(tiny_model("llama"), random_tokens(), "head", steps=2, out=tmp_path / "m", log="tensorboard")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m", "m.log"]


def test_trackio_is_given_the_same_numbers(monkeypatch, tmp_path, capsys):
    calls = []

    class Fake:
        @staticmethod
        def init(**words):
            print("trackio has much to say")
            calls.append(("init", words))

        @staticmethod
        def log(numbers, step):
            calls.append((step, numbers))

        @staticmethod
        def finish():
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "trackio", Fake)
    result = train(
        tiny_model("llama"), random_tokens(), recipe="head", settings=settings(steps=2), log="trackio",
        log_folder=tmp_path / "mine",
    )  # fmt: skip
    assert calls[0] == ("init", {"project": "mine", "name": "head", "resume": "allow"})
    assert calls[-1] == "finish"
    assert [numbers["loss/train"] for _, numbers in calls[1:-1]] == result.history["loss"].tolist()
    assert capsys.readouterr().out == ""  # stdout is for results


def test_without_a_log_nothing_is_in_between():
    with run_log("none", None, name="x", on_row=print) as write:
        assert write is print
    with run_log("tensorboard", "nowhere", name="x", main=False, on_row=print) as write:
        assert write is print


@pytest.mark.parametrize("kind", ["tensorboard", "trackio"])
def test_a_missing_package_is_named_before_anything_is_trained(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(MissingExtraError, match=r"preln\[log\]"):
        heal_model(tiny_model("llama"), random_tokens(), "head", steps=2, out=tmp_path / "m", log=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "message"),
    [({"log": "wandb"}, "choose one of none, tensorboard, trackio"), ({"log": "tensorboard"}, "log_folder")],
)
def test_mistakes_are_said_in_one_line(told, message):
    with pytest.raises(InputError, match=message):
        train(tiny_model("llama"), random_tokens(), settings=settings(), **told)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_says_loss_speed_and_time_left(monkeypatch):
    monkeypatch.setattr("preln.base.progress._DELAY_S", 0.0)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    result = train(tiny_model("llama"), random_tokens(), recipe="head", settings=settings(steps=30))
    shown = sys.stderr.getvalue()
    assert "heal head" in shown and "tokens/s" in shown
    losses = [f"loss {loss:.4f}" for loss in result.history["loss"]]
    assert any(loss in shown for loss in losses)


def test_the_size_of_stored_states_is_said_first_and_once(tmp_path, capsys, monkeypatch):
    from preln.heal.prefix import cache as module

    build = module.build_prefix

    def watched(*args, **options):
        said.append(capsys.readouterr().err)
        return build(*args, **options)

    said: list[str] = []
    monkeypatch.setattr(module, "build_prefix", watched)
    told = {"recipe": "partial-1", "settings": settings(steps=1)}
    for _ in range(2):  # the second time the file is there
        cache = Cache(tmp_path / "c", mode="on", depths=[2])
        train(tiny_model("llama"), random_tokens(), cache=cache, **told)
    numbers = 2 * 12 * 16 * tiny_model("llama").config.hidden_size
    size = f"{4 * numbers / 1000:.1f} kB"
    assert said == [f"heal: stored states: 2 depths, 192 tokens, {size} in {tmp_path / 'c'}\n", ""]
    file = next((tmp_path / "c").glob("*.safetensors"))
    assert 0 <= file.stat().st_size - 4 * numbers < 1000  # what was said is what was written
    with pytest.raises(InputError, match="cache budget"):
        train(tiny_model("llama"), random_tokens(), cache=Cache(tmp_path / "d", "on", budget=10), **told)
    assert said[2:] == [""]  # a refusal is one line
