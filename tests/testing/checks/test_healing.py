"""The checks of healing pass, and notice wrong counts, a changing prefix, and a wrong limit."""

import pytest
import torch

from preln.testing.checks import cost, healing
from preln.theory import healing as theory
from preln.theory.healing import LLAMA_31_8B

PROPERTIES = healing.PROPERTIES | cost.PROPERTIES

pytestmark = pytest.mark.integration


def outcomes(id, rounds=2):
    return [e.outcome for e in PROPERTIES[id](rounds)]


@pytest.mark.parametrize("id", PROPERTIES)
def test_passes(id):
    found = PROPERTIES[id](2)
    assert found and all(e.kind == "property" and e.passed and e.detail["n"] > 0 for e in found), found


def test_published_numbers_are_those_of_the_modules():
    model = healing.llama(LLAMA_31_8B, "meta")
    counted = {k: healing._tail_size(model, k) for k in range(4)}
    counted["LoRA"] = healing._adapter_size(model, healing.RANK)
    assert counted == healing.PUBLISHED


def test_adapters_count_the_same_without_peft(monkeypatch):
    from preln.base.errors import MissingExtraError

    def missing(model, rank):
        raise MissingExtraError("peft")

    config = healing._random_config(torch.Generator().manual_seed(0))
    counted = healing._adapter_size(healing.llama(config, "meta"), 3)
    monkeypatch.setattr(healing, "with_adapters", missing)
    assert counted == healing._adapter_size(healing.llama(config, "meta"), 3) > 0


@pytest.mark.parametrize("name", ["lora_parameters", "tail_parameters"])
def test_counts_notice_one_parameter(name, monkeypatch):
    honest = getattr(theory, name)
    monkeypatch.setattr(theory, name, lambda *a: honest(*a) + 1)
    assert outcomes("HEAL-PARAMS") == ["pass", "fail"]


def test_counts_notice_another_model(monkeypatch):
    monkeypatch.setitem(LLAMA_31_8B, "num_key_value_heads", 32)
    assert outcomes("HEAL-PARAMS") == ["fail", "pass"]


def test_prefix_notices_dropout(monkeypatch):
    """A prefix that is not the same at every pass cannot be cached."""
    honest = healing.hidden_states

    def dropping(blocks, x):
        states = honest(blocks, x)
        return [*states[:-1], torch.dropout(states[-1], 0.1, train=True)] if not x.requires_grad else states

    monkeypatch.setattr(healing, "hidden_states", dropping)
    torch.manual_seed(0)
    assert outcomes("HEAL-PREFIX")[0] == "fail"


def test_prefix_notices_a_tail_that_does_not_train(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert outcomes("HEAL-PREFIX") == ["pass", "fail"]


def test_rank_notices_a_limit_that_is_off_by_one(monkeypatch):
    """sigma_r for sigma_{r+1}: the truncation beats it."""
    honest = torch.linalg.svd

    def shifted(m, **k):
        u, values, v = honest(m, **k)
        return u, torch.cat([values[:, :1], values[:, :-1]], -1), v

    monkeypatch.setattr(torch.linalg, "svd", shifted)
    assert outcomes("HEAL-RANK") == ["fail", "fail"]


@pytest.mark.parametrize("part", ["w", "s", "h", "c", "skipped"])
def test_cost_notices_one_operation(part, monkeypatch):
    honest = cost.cost
    monkeypatch.setattr(cost, "cost", lambda *a: (c := honest(*a))._replace(**{part: getattr(c, part) + 1}))
    assert outcomes("HEAL-COST")[0] == "fail"


def test_cost_notices_a_wrong_limit(monkeypatch):
    honest = cost.cost
    monkeypatch.setattr(cost, "cost", lambda *a: honest(*a)._replace(c=0))
    assert outcomes("HEAL-COST", 4) == ["fail", "fail"]
