"""What `docs/extend.md` shows works as it stands there; what it says is refused is refused."""

import doctest
import importlib
import importlib.util
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from preln import heal
from preln.cli import main
from preln.heal.options import recipes
from preln.models.residual import on_blocks
from preln.prune.registry import CRITERIA
from preln.testing import checks, gate
from preln.theory import CLAIMS, Ledger, decide, ledger, registry
from preln.theory.own import own_claims

from .pages import ROOT, blocks

pytestmark = pytest.mark.integration
PAGE = blocks((ROOT / "docs" / "extend.md").read_text(encoding="utf-8"))
FILES = {block.title: block.text for block in PAGE if block.title}
COLLECTED = gate._uncollected


@pytest.fixture(autouse=True)
def registries(monkeypatch, tmp_path):
    """An empty folder to work in, and registries that are afterwards what they were."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    monkeypatch.chdir(tmp_path)
    registry()  # the built-in claims register once, as they are imported
    kept = [CRITERIA, recipes._REGISTRY, CLAIMS, CONFIG_MAPPING._extra_content]
    kept.append(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content)
    before = [dict(each) for each in kept]
    yield
    for each, entries in zip(kept, before, strict=True):
        each.clear()
        each.update(entries)
    assert "RMS-JAC" in CLAIMS and "SIM-SHRINK" not in CLAIMS and "relative_update" not in CRITERIA


def run(name):
    """Run the file of a name as the page has it, and the sessions up to the next file; returns its names."""
    place = next(i for i, block in enumerate(PAGE) if block.title == name)
    space = {"__name__": name.partition(".")[0]}
    exec(compile(PAGE[place].text, name, "exec"), space)  # the page is this project's own
    sessions = []
    for block in PAGE[place + 1 :]:
        if block.title:
            break
        if block.language == "pycon":
            sessions.append(block.text)
    assert sessions
    test = doctest.DocTestParser().get_doctest("\n".join(sessions), space, name, name, 0)
    said = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(test, out=said.write, clear_globs=False)
    assert not said.getvalue(), said.getvalue()
    return space


def test_the_files_of_the_page_are_all_run_here():
    assert set(FILES) == {
        "mine.py",
        "src/preln/theory/example.py",
        "src/preln/testing/checks/example.py",
        "theory/pruning.md",
        "tests/theory/test_example.py",
        "criterion.py",
        "recipe.py",
        "architecture.py",
    }


def test_a_right_claim_is_proved_and_a_wrong_one_is_reported(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FILES["mine.py"], encoding="utf-8")
    command = next(b.text for b in PAGE if b.language == "bash" and "mine.py" in b.text)
    assert main([*command.split()[1:], "--out", "out"]) == 1
    printed = capsys.readouterr().out
    shown = next(b.text for b in PAGE if b.language == "text" and "MY-GROW" in b.text)
    for line in shown.splitlines():
        assert line in printed.splitlines(), printed
    written = {c["id"]: c for c in json.loads((tmp_path / "out" / "ledger.json").read_text())["claims"]}
    assert written["MY-SHRINK"]["status"] == "proved"
    # the solver's counterexample, put in by hand
    model = {k: float(eval(v)) for k, v in written["MY-GROW"]["evidence"][0]["detail"]["model"].items()}
    assert model["after"] < model["before"]
    assert abs(model["c"]) <= model["rho"]
    squared = model["before"] ** 2 * (1 + 2 * model["c"] + model["rho"] ** 2)
    assert np.isclose(model["after"] ** 2, squared)
    assert main(["verify", "MY-SHRINK", "--ledger", "mine.py"]) == 0


def test_a_claim_without_its_assumption_would_not_be_proved(tmp_path):
    text = FILES["mine.py"].replace("[LENGTH, *CAUCHY_SCHWARZ, rho < 1]", "[LENGTH, *CAUCHY_SCHWARZ]")
    wrong = text.replace("(1 - rho) * before)", "(1 - rho / 2) * before)")
    assert wrong != text != FILES["mine.py"]
    (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
    with own_claims(["wrong.py"]):
        assert decide(["MY-SHRINK"]).claims["MY-SHRINK"].status != "proved"


@pytest.fixture
def built_in(monkeypatch, tmp_path):
    """A checkout with the page's files in it: written proofs and tests, beside the real package."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "theory", root / "theory")
    with (root / "theory" / "pruning.md").open("a", encoding="utf-8") as page:
        page.write("\n" + FILES["theory/pruning.md"])
    test = root / "tests" / "theory" / "test_example.py"
    test.parent.mkdir(parents=True)
    test.write_text(FILES["tests/theory/test_example.py"], encoding="utf-8")
    for name in ("preln.theory.example", "preln.testing.checks.example"):
        path = f"src/{name.replace('.', '/')}.py"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(FILES[path], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, root / path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    family = "Pruning and similarity"
    monkeypatch.setitem(ledger.FAMILIES, family, (*ledger.FAMILIES[family], "example"))
    monkeypatch.setattr(checks, "_ROOMS", (*checks._ROOMS, "example"))
    checks.checks.cache_clear()
    # pytest is asked what it collects in one test only, since that starts a process
    monkeypatch.setattr(gate, "_uncollected", lambda sections, root: [])
    yield root
    checks.checks.cache_clear()
    for name in ("theory", "testing.checks"):  # an import binds a module in its package
        package = importlib.import_module(f"preln.{name}")
        if hasattr(package, "example"):
            delattr(package, "example")


def complaints(root):
    """What the gate says of the new claim."""
    found = gate.problems(Ledger(decide(["SIM-SHRINK"]).claims), root)
    return [line for line in found if "SIM-SHRINK" in line or "test_example" in line]


def test_a_built_in_claim_passes_the_gate(built_in, collects):
    assert complaints(built_in) == []
    text = FILES["tests/theory/test_example.py"].replace("def test_", "def check_")
    (built_in / "tests" / "theory" / "test_example.py").write_text(text, encoding="utf-8")
    assert complaints(built_in) == ["tests/theory/test_example.py: pytest collects no test in it"]


@pytest.fixture
def collects(built_in, monkeypatch):
    """The gate as it is, with pytest asked what it collects."""
    monkeypatch.setattr(gate, "_uncollected", COLLECTED)


def test_a_built_in_claim_is_decided_and_holds_on_numbers(built_in):
    assert decide(["SIM-SHRINK"]).claims["SIM-SHRINK"].status == "proved"
    evidence = checks.checks()["SIM-SHRINK"](4)
    assert [e.outcome for e in evidence] == ["pass"]
    space = {}
    exec(compile(FILES["tests/theory/test_example.py"], "test_example.py", "exec"), space)
    space["test_the_bound_is_proved_and_its_mutants_are_rejected"]()


@pytest.mark.parametrize(
    ("path", "old", "new", "complaint"),
    [
        ("theory/pruning.md", "## SIM-SHRINK\n", "### SIM-SHRINK\n", "no section"),
        ("theory/pruning.md", "(1 - rho)|x| with rho", "(1 - 2 rho)|x| with rho", "the statement differs"),
        (
            "theory/pruning.md",
            "example.sim_shrink",
            "example.sim_grow",
            "is not the function that decides it",
        ),
        ("theory/pruning.md", "tests/theory/test_example.py", "tests/theory/test_gone.py", "does not exist"),
    ],
)
def test_a_built_in_claim_that_lacks_a_part_does_not(built_in, path, old, new, complaint):
    text = (built_in / path).read_text(encoding="utf-8")
    head, _, tail = text.rpartition("## SIM-SHRINK") if path.endswith(".md") else ("", "", text)
    mark = "## SIM-SHRINK" if head else ""
    assert old in mark + tail
    (built_in / path).write_text(head + (mark + tail).replace(old, new, 1), encoding="utf-8")
    assert any(complaint in line for line in complaints(built_in)), complaints(built_in)


def test_a_built_in_claim_without_numbers_does_not(built_in, monkeypatch):
    monkeypatch.setattr(sys.modules["preln.testing.checks.example"], "PROPERTIES", {})
    checks.checks.cache_clear()
    assert complaints(built_in) == ["SIM-SHRINK: no check on numbers"]


def test_a_bound_that_is_too_strong_fails_on_numbers(built_in, monkeypatch):
    text = FILES["src/preln/testing/checks/example.py"].replace("(1 - rho.squeeze", "(1 - 0.9 * rho.squeeze")
    space = {"__name__": "stronger"}
    exec(compile(text, "stronger.py", "exec"), space)
    assert [e.outcome for e in space["sim_shrink"](1)] == ["fail"]


def test_a_criterion_scores_prunes_and_is_refused_where_it_is_wrong():
    space = run("criterion.py")
    model, tokens = space["model"], space["tokens"]
    squares = np.zeros((2, 6))

    def visit(layer, x, y):
        squares[0, layer] += float(x.double().square().sum())
        squares[1, layer] += float((y.double() - x.double()).square().sum())

    with torch.no_grad(), on_blocks(list(model.model.layers), visit):
        model(tokens)
    mine = space["scores"].query("metric == 'relative_update'").sort_values(by="layer")
    np.testing.assert_allclose(mine["score"], np.sqrt(squares[1] / squares[0]), rtol=1e-5)
    other = space["scores"].query("metric == 'block_influence'").sort_values(by="layer")
    assert not np.allclose(mine["score"], other["score"], rtol=1e-2)
    assert space["plan"].drop == tuple(sorted(np.argsort(mine["score"].to_numpy())[:2].tolist()))


def test_recipes_train_what_they_say():
    space = run("recipe.py")
    changed = {
        name
        for name, tensor in space["results"]["tail-2-cosine"].model.state_dict().items()
        if not torch.equal(tensor, space["small"].state_dict()[name])
    }
    assert changed
    assert all(
        name.startswith(("model.layers.2.", "model.layers.3.", "model.norm.", "lm_head.")) for name in changed
    )
    narrow = heal.trainable_parameters(space["small"], "lora")
    assert space["results"]["lora-wide"].manifest["trainable_parameters"] == 2 * narrow


def test_an_architecture_of_ones_own_is_measured_and_cut():
    space = run("architecture.py")
    with torch.no_grad():
        whole, cut = space["model"](space["tokens"]).logits, space["small"](space["tokens"]).logits
    assert not torch.allclose(whole, cut)
    with torch.no_grad():
        space["model"].layers[1].forward = lambda hidden_states: hidden_states
        assert torch.equal(space["model"](space["tokens"]).logits, cut)
