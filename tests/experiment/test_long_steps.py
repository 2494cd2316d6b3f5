"""Steps that measure go on within themselves: a run stopped at every save does nothing twice."""

import pytest

import preln.probe.measure as measure
from preln.base import journal
from preln.base.checkpoints import Checkpoints
from preln.experiment import read_study, run_study
from preln.probe.passes import Passes
from preln.prune.evidence import _Passes
from preln.prune.greedy import Stack

from .test_run import numbers, results

pytestmark = pytest.mark.integration


def test_a_run_stopped_at_every_save_does_nothing_twice(study_values, write_yaml, tmp_path, monkeypatch):
    study_values["heal"], study_values["hypotheses"] = [], study_values["hypotheses"][:1]
    study_values["prune"] = {
        "metrics": ["reverse", "taylor", "perplexity", "sleb"],
        "drop": [2],
        "probe": ["reverse-2"],
    }
    study = read_study(write_yaml(study_values))
    done = []
    for kind, name in ((Passes, "take"), (_Passes, "take"), (Stack, "without")):
        honest = getattr(kind, name)

        def noted(*arguments, honest=honest, label=f"{kind.__module__}.{name}"):
            done.append(label)
            return honest(*arguments)

        monkeypatch.setattr(kind, name, noted)
    run_study(study, tmp_path / "whole")
    needed = sorted(done)
    assert len(set(needed)) == 3
    done.clear()
    monkeypatch.setattr(journal, "SECONDS", -1.0)
    monkeypatch.setattr(measure, "CHECKPOINT_SECONDS", -1.0)
    save, stops = Checkpoints.save, 0

    def stopped(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    while True:
        monkeypatch.setattr(Checkpoints, "save", stopped)
        try:
            run_study(study, tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 100
    assert stops > 10
    assert sorted(done) == needed
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert not list((tmp_path / "stopped").glob(".work/*/*"))
