"""The sweep over architectures: its laws pass where a claim is right and fail where it is not."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from preln.models import anatomy, tiny_model

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def sweep():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_architectures", FOLDER / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_architectures"] = module
    spec.loader.exec_module(module)
    yield module
    for name in ("benchmark_architectures", "laws", "shrink"):
        sys.modules.pop(name, None)
    sys.path.remove(str(FOLDER))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "verdict"),
    [
        ("llama", "pre-ln"),
        ("codegen", "parallel"),
        ("bart", "post-ln"),
        ("glm4", "sandwich"),
        ("doge", "unknown"),
        ("xlnet", "refused"),
        ("gemma4_assistant", "not built"),
    ],
)
def test_verdicts(sweep, model_type, verdict):
    row = sweep.examine(model_type)
    assert row.verdict == verdict
    assert "FAILS" not in row.notes
    assert f"| `{model_type}` |" in sweep.page([row])


def failures(sweep, model, found, placement, **parts):
    """What the laws say of block 1 under another claim."""
    found.placements[1] = placement
    found.block_parts[1] = replace(found.parts(1), **parts)
    return sweep.block_laws(model, found, 1)


@pytest.mark.parametrize("claim", ["parallel", "post-ln", "norm-after-branch"])
def test_a_pre_ln_block_fails_every_other_law(sweep, claim):
    model = tiny_model("llama")
    found = anatomy(model)
    assert sweep.block_laws(model, found, 1) == []
    parts = found.parts(1)
    behind = {"attention_norm_after": parts.attention_norm, "mlp_norm_after": parts.mlp_norm}
    assert failures(sweep, model, found, claim, **behind)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "opt-post", "gpt_neox"])
def test_other_blocks_fail_the_law_of_pre_ln(sweep, name):
    model = tiny_model(name)
    found = anatomy(model)
    assert sweep.block_laws(model, found, 1) == []
    parts = found.parts(1)
    norms = {
        "attention_norm": parts.attention_norm or parts.attention_norm_after,
        "mlp_norm": parts.mlp_norm or parts.mlp_norm_after,
    }
    assert failures(sweep, model, found, "pre-ln", **norms)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["doge", "minimax", "gemma4_text"])
def test_what_is_called_unknown_is_no_pre_ln_block_indeed(sweep, model_type):
    model = sweep.tiny(model_type)
    found = anatomy(model)
    assert found.placements[1] == "unknown"
    assert failures(sweep, model, found, "pre-ln")


def test_a_wrong_final_norm_is_seen(sweep):
    model = tiny_model("llama")
    found = anatomy(model)
    assert not any("FAILS" in note for note in sweep.stream_laws(model, found))
    found.final_norm = found.parts(0).mlp_norm
    assert any("final norm" in note for note in sweep.stream_laws(model, found))


def test_every_row_of_the_page_is_of_this_kind(sweep):
    page = sweep.PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    verdicts = [row.split("|")[3].strip() for row in rows]
    assert set(verdicts) <= set(sweep.VERDICTS) - {"WRONG", "CRASHED"}
    for verdict in set(verdicts):
        assert f"| {verdict} | {verdicts.count(verdict)} |" in page
