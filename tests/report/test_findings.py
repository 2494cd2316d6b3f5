"""Verdicts of several studies side by side, and measured numbers beside published ones."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.experiment.published import published_table, read_published
from preln.report import beside_published
from preln.report.beside_published import beside, recipes, selections
from preln.report.findings import matrix, overall, read_runs, verdict_table, verdicts

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "experiments" / "published" / "reassessing.yaml"


def verdict(name, status, model=None, value=0.5):
    return {"id": name, "statement": "|x| falls", "model": model, "status": status, "statistic": "s",
            "meaning": "m", "value": value, "interval": [0.4, 0.6], "expected": "above 0", "n": 3,
            "note": "a | b"}  # fmt: skip


def run(name, *found):
    return SimpleNamespace(name=name, verdicts=found)


def test_verdicts_of_several_studies_stand_side_by_side():
    table = verdict_table(
        [
            run("one", verdict("HYP-A", "supported"), verdict("HYP-B", "supported", "x-1")),
            run("two", verdict("HYP-B", "unsupported", "y-1"), verdict("HYP-B", "inconclusive", "y-2")),
        ]
    )
    lines = matrix(table).splitlines()
    assert lines[0] == "| hypothesis | one | two | over all |"
    assert lines[2] == "| `HYP-A` \\|x\\| falls | holds |  | **holds** |"
    assert lines[3].endswith("| holds | does not hold (y-1), undecided (y-2) | **mixed** |")
    many = [verdict("HYP-A", status, str(n)) for n, status in enumerate(["supported"] * 3 + ["untested"] * 2)]
    assert matrix(verdict_table([run("one", *many)])).endswith("| 3 × holds, 2 × – | **holds** |")


@pytest.mark.parametrize(
    ("statuses", "word"),
    [
        (["inconclusive", "untested"], "inconclusive"),
        (["supported", "supported"], "supported"),
        (["unsupported", "untested"], "unsupported"),
        (["unsupported", "inconclusive"], "unsupported where decided"),
        ([], "untested"),
    ],
)
def test_one_word_for_several_verdicts(statuses, word):
    assert overall(statuses) == word


def test_committed_runs_have_pages(tmp_path):
    runs = read_runs(ROOT / "experiments" / "results")
    assert "quickstart" in [each.name for each in runs]
    for each in runs:
        page = verdicts(each)
        assert page.count("\n| `HYP-") == len(each.verdicts)
        assert "nan" not in page
    with pytest.raises(InputError, match="holds no run with verdicts"):
        read_runs(tmp_path)


def heal(metric, blocks, recipe, loss, validation, rate=1e-3, name=None):
    return {"metric": metric, "drop": list(range(blocks)), "base_recipe": recipe, "recipe": name or recipe,
            "loss_before": 9.0, "loss_after": loss, "validation_after": validation, "learning_rate": rate,
            "id": f"heal-{metric}-{blocks}-{recipe}"}  # fmt: skip


def measured():
    prunes = [
        {"metric": metric, "drop": list(range(8)), "loss": loss, "dense_loss": 3.0}
        for metric, loss in (("reverse", 9.0), ("perplexity", 4.0), ("taylor", 5.0), ("sleb", 1.0))
    ]
    heals = (
        heal("reverse", 8, "partial-3", 3.5, 3.4),
        heal("perplexity", 8, "partial-3", 3.0, 3.1),
        heal("reverse", 8, "lora", 4.0, 4.2, 1e-4),
        heal("reverse", 8, "lora", 4.5, 4.1, 1e-3, "lora-0.001"),
        heal("reverse", 15, "lora", 1.0, 1.0),
    )
    evaluations = (
        {"id": "evaluate-dense", "mean_acc": 0.5},
        {"id": "evaluate-heal-reverse-8-partial-3", "mean_acc": 0.4},
    )
    damage = pd.DataFrame({"layer": [0], "loss": [3.0], "delta": [0.5]})
    return SimpleNamespace(
        name="measured",
        manifest={"model": {"blocks": 30}},
        prunes=tuple(prunes),
        heals=heals,
        evaluations=evaluations,
        damage=damage,
    )


def test_selections_are_compared_by_what_is_kept_and_by_place():
    published = published_table([SOURCE])
    table = selections(measured(), published, healed_by="partial-3").set_index("selection")
    assert list(table.index) == ["reverse", "taylor", "perplexity"]  # what was not published is left out
    plain = published[(published["statistic"] == "mean_acc") & published["method"].isna()]
    numbers = plain[(plain["metric"] == "reverse") & (plain["share"] == 0.25)]
    numbers = numbers[numbers["recipe"] == "reassess-lora"].set_index("model")["value"]
    dense = plain[plain["metric"].isna()].set_index("model")["value"]
    assert table.loc["reverse", "kept"] == pytest.approx((numbers / dense[numbers.index]).mean())
    assert table.loc["reverse", "models"] == 4
    assert table["published_place"].tolist() == [1, 3, 2]
    assert table["raw_place"].tolist() == [3, 2, 1]
    assert table.loc[["reverse", "perplexity"], "healed_place"].tolist() == [2, 1]
    assert pd.isna(table.loc["taylor", "healed_place"])
    assert table.loc["reverse", "accuracy_kept"] == pytest.approx(0.8)


def test_recipes_are_taken_at_the_rate_that_validation_chose():
    table = recipes(measured(), published_table([SOURCE]))
    assert table["recipe"].tolist() == ["lora at 0.001", "partial-3 at 0.001"]
    assert table["loss_healed"].tolist() == [4.5, 3.5]  # not the lower held-out loss of the other rate
    assert table["published_place"].tolist() == [2, 1]


def test_the_page_tells_caveats_and_agreement(monkeypatch):
    caveats = read_published(SOURCE).caveats
    page = beside(measured(), published_table([SOURCE]), caveats, healed_by="partial-3")
    assert "Rank correlation" not in page  # of three conditions it says nothing
    assert all(caveat.split()[0] in page for caveat in caveats)
    assert "nan" not in page
    monkeypatch.setattr(beside_published, "FEWEST", 2)
    page = beside(measured(), published_table([SOURCE]), caveats, healed_by="partial-3")
    told = [line for line in page.splitlines() if line.startswith("Rank correlation")]
    assert told[0].startswith("Rank correlation of published with measured places: -0.50 with raw ones (3 at")
    assert "raw" not in told[1]  # two recipes of one raw model have no place by it
    assert "nan" not in page
