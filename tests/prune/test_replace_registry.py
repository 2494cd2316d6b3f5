"""One call path for every replacement, and its plans."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from preln.base.errors import InputError
from preln.models import load_model, tiny_model
from preln.prune import read_plan, replace_blocks, write_checkpoint
from preln.prune.replace import REPLACEMENTS, read_settings, repeat_plan, replacement, settings_of

pytestmark = pytest.mark.integration
BATCH = torch.randint(1, 512, (6, 14), generator=torch.Generator().manual_seed(0))
QUICK = {
    "streamline": {"steps": 60, "learning_rate": 3e-3},
    "elder": {"steps": 3},
}
ALL = ["elder", "grasp", "laco", "mka", "sliding_merge", "streamline"]


def test_the_registry_is_complete():
    assert sorted(REPLACEMENTS) == ALL
    with pytest.raises(ValueError, match="twice"):
        replacement("laco")(lambda: None)


@pytest.mark.parametrize("method", ALL)
def test_a_replacement_is_a_plain_checkpoint_and_its_plan_repeats_it(method, tmp_path):
    model, tokenizer = load_model("tiny:llama")
    small, plan = replace_blocks(model, BATCH, method, drop=2, name="tiny:llama", **QUICK.get(method, {}))
    assert plan.method == method and plan.settings["size"] == 2 and plan.model == "tiny:llama"
    out = write_checkpoint(small, tokenizer, plan, tmp_path / "out", licence="MIT")
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(loaded(BATCH).logits, small(BATCH).logits)
    again = repeat_plan(model, BATCH, read_plan(out / "plan.yaml"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))
    card = (out / "README.md").read_text()
    assert f"`{method}` replaced blocks" in card and "Setting `seed`" in card
    assert ("nothing is saved" in card) == (method == "grasp")
    with pytest.raises(InputError, match="read other tokens"):
        repeat_plan(model, BATCH + 1, plan)


def test_bad_requests_are_one_line():
    model = tiny_model("llama")
    for keywords, message in (
        ({"method": "nonsense"}, "method 'nonsense' is unknown: choose from remove, "),
        ({"bogus": 1}, "no setting 'bogus'"),
        ({"threshold": "x"}, "a number is needed"),
        ({"interval": 1.5}, "a whole number is needed"),
        ({"step": float("nan")}, "a finite number"),
        ({"drop": 0}, "name at least 1"),
        ({"drop": 4}, "keep at least 1"),
        ({"drop": 3, "protect": "sleb"}, "leaves only 2"),
        ({"protect": "nonsense"}, "unknown"),
    ):
        with pytest.raises(InputError, match=message) as error:
            replace_blocks(model, BATCH, **{"method": "laco", "drop": 1, **keywords})
        assert "\n" not in str(error.value)


def test_settings_are_read_as_their_defaults_are():
    assert read_settings("laco", ["interval=3", "threshold=0.5"]) == {"interval": 3, "threshold": 0.5}
    assert set(settings_of("grasp")) == {"ratio"}
    for text in ("interval=x", "interval", "bogus=1", "interval=1.5"):
        with pytest.raises(InputError, match="--set"):
            read_settings("laco", [text])
