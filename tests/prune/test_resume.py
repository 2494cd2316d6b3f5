"""Scores that were stopped go on to the very numbers of those that were not, and nothing is done twice."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from preln.base import journal
from preln.base.checkpoints import Checkpoints
from preln.base.errors import InputError
from preln.models import tiny_model
from preln.prune import compare, removal_losses, score, score_any
from preln.prune.evidence import _Passes
from preln.prune.greedy import Stack

pytestmark = pytest.mark.integration


def batch(n=4, t=7, seed=3):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(seed))


def one_by_one(model, metrics):
    return score(model, batch(), metrics, batch_size=1, size=2)


WORK = {
    "shared": lambda m: one_by_one(m, "block_influence,angular,angular_all_tokens,perplexity,taylor"),
    "all": lambda m: one_by_one(m, "all"),
    "sleb": lambda m: one_by_one(m, "sleb"),
    "iterative": lambda m: one_by_one(m, "block_influence@1,perplexity@1"),
    "by_sequence": lambda m: one_by_one(m, "taylor_by_sequence"),
    "halves": lambda m: score_any(m, batch(), "finercut,block_influence", size=2),
    "removals": lambda m: removal_losses(m, batch(), {"a, 1": [1], "b": [0, "2a"], "": []}, batch_size=1),
    "damage": lambda m: compare(m, batch(), batch(seed=5), "reverse,angular,sleb", drops=[1, 2]).damage,
}


class Killed(Exception):
    """Stands for a kill: nothing in preln handles it."""


def work_done(monkeypatch):
    """A list that gets an entry for every sequence batch that is passed and every part that is tried."""
    done, take, without = [], _Passes.take, Stack.without
    monkeypatch.setattr(_Passes, "take", lambda *a: (done.append("pass"), take(*a))[1])
    monkeypatch.setattr(Stack, "without", lambda *a: (done.append("part"), without(*a))[1])
    return done


@pytest.mark.parametrize("kind", WORK)
def test_stopped_after_every_save_it_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch):
    model, done = tiny_model("llama", blocks=4), work_done(monkeypatch)
    expected, needed = WORK[kind](model), len(done)
    done.clear()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(journal, "SECONDS", -1.0)
    save = Checkpoints.save

    def killed(*arguments):
        save(*arguments)
        raise Killed

    kills, found = 0, None
    while found is None:
        monkeypatch.setattr(Checkpoints, "save", killed)
        try:
            with journal.journalled(tmp_path / "r", "this"):
                found = WORK[kind](model)
        except Killed:
            kills += 1
            assert kills < 200
        monkeypatch.setattr(Checkpoints, "save", save)
    assert kills >= 2
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert len(done) == needed, "something was done twice, or left out"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_written_within_the_first_minute(tmp_path):
    with journal.journalled(tmp_path / "r", "this"):
        WORK["sleb"](tiny_model("llama", blocks=3))
    assert list(tmp_path.iterdir()) == []


def test_after_a_minute_every_stage_that_ends_is_kept(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    with journal.journalled(tmp_path / "r", "this"):
        first = journal.next_stage("a")
        first.save(1, lambda: ({"n": 1}, {}), last=True)
        assert not (tmp_path / "r").exists()
        now[0] = 61.0
        second = journal.next_stage("b")
        second.save(1, lambda: ({"n": 2}, {}), last=False)
        now[0] = 70.0
        second.save(2, lambda: ({"n": 3}, {}), last=False)  # not yet a minute later
        journal.next_stage("c").save(1, lambda: ({"n": 4}, {}), last=True)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["000002", "000003"]
    with journal.journalled(tmp_path / "r", "this"):
        stored = [journal.next_stage(name).restore() for name in "abc"]
    assert [state and state[0]["n"] for state in stored] == [None, 2, 4]
    assert journal.next_stage("a").restore() is None  # outside there is none


def test_a_journal_of_another_command_or_a_changed_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SECONDS", -1.0)
    model = tiny_model("llama", blocks=3)
    with journal.journalled(tmp_path / "r", "this"):
        WORK["sleb"](model)
    with (
        journal.journalled(tmp_path / "r", "that"),
        pytest.raises(InputError, match="of another run") as told,
    ):
        WORK["sleb"](model)
    assert str(told.value).endswith(f"or remove {tmp_path / 'r'} to start anew")
    with journal.journalled(tmp_path / "r", "this"), pytest.raises(InputError, match="stage was 'sleb'"):
        WORK["shared"](model)
    state = next((tmp_path / "r").rglob("state.json"))
    state.write_text(state.read_text().replace("chosen", "chosem"))
    with journal.journalled(tmp_path / "r", "this"), pytest.raises(InputError, match="corrupted"):
        WORK["sleb"](model)
