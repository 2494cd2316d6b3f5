"""The LaTeX tables compile, whatever the data holds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from preln.report.load import load_run
from preln.report.run_tables import run_tables

PDFLATEX = shutil.which("pdflatex")


def compiled(folder: Path, body: str) -> tuple[int, str]:
    """Compile a document that loads booktabs and nothing else of note; the status and the log."""
    text = "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage[utf8]{inputenc}\n"
    text += "\\usepackage{booktabs}\n\\begin{document}\n" + body + "\n\\end{document}\n"
    (folder / "main.tex").write_text(text, encoding="utf-8")
    command = [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main.tex"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode, done.stdout.decode("utf-8", "replace")


@pytest.mark.skipif(PDFLATEX is None, reason="pdflatex is not installed")
def test_every_table_compiles(run_folder: Path, tmp_path: Path) -> None:
    files = run_tables(load_run(run_folder))
    tables = sorted(name for name in files if name.endswith(".tex"))
    assert len(tables) == 5
    for name in tables:
        (tmp_path / name).write_text(files[name], encoding="utf-8")
    status, log = compiled(tmp_path, "\n\n".join(rf"{{\tiny\input{{{name}}}}}" for name in tables))
    assert status == 0, log[-2000:]
    assert (tmp_path / "main.pdf").stat().st_size > 1000
    assert "Missing character" not in log


@pytest.mark.skipif(PDFLATEX is None, reason="pdflatex is not installed")
def test_unescaped_data_would_not_compile(tmp_path: Path, hostile: str) -> None:
    table = "\\begin{tabular}{l}\\toprule\n" + hostile + " \\\\\n\\bottomrule\\end{tabular}"
    status, _ = compiled(tmp_path, table)
    assert status != 0
