"""The README's tables are made from the committed results, and from nothing else."""

from pathlib import Path

import pytest

from preln.base.errors import InputError
from preln.report.load import load_run
from preln.report.markdown import fill_readme, findings

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "quickstart"


def test_the_readme_shows_the_committed_run():
    readme = ROOT / "README.md"
    assert fill_readme(readme, load_run(RESULTS)) == readme.read_text(encoding="utf-8")


def test_the_committed_run_came_from_clean_code_and_is_finished():
    manifest = load_run(RESULTS).manifest
    assert manifest["status"] == "finished"
    assert manifest["git"]["dirty"] is False
    assert len(manifest["git"]["commit"]) == 40


def test_the_committed_run_is_the_shipped_study():
    from preln.experiment import read_study

    assert read_study(RESULTS / "config.yaml") == read_study(ROOT / "experiments" / "quickstart.yaml")


def test_findings_name_every_refuted_theorem_and_every_verdict():
    run = load_run(RESULTS)
    text = findings(run)
    for claim in run.claims:
        if claim["kind"] == "theorem":
            assert (f"| `{claim['id']}` |" in text) == (claim["status"] == "refuted")
    for verdict in run.verdicts:
        assert f"`{verdict['id']}`" in text
        assert f"**{verdict['status']}**" in text


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(InputError, match="markers"):
        fill_readme(tmp_path / "README.md", load_run(RESULTS))
