import importlib.util
import sys
from pathlib import Path

import pytest

from preln import cli

from . import commands

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark(request):
    """The benchmark that a test module names as ``BENCHMARK``."""
    name = f"benchmark_{request.module.BENCHMARK}"
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{request.module.BENCHMARK}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    sys.modules.pop(name, None)
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with a corpus, a study and a finished run of it, which the report reads."""
    folder = tmp_path_factory.mktemp("prepared")
    commands.corpus(folder)
    commands.study(folder)
    assert cli.main([*commands.commands(folder)["run"], "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def quick_figures(monkeypatch):
    """Figures of a few bytes: drawing them takes most of a report's time and writes nothing."""
    made = {f"figure-{number}.png": bytes([number]) * 100 for number in range(5)}
    monkeypatch.setattr("preln.report.build.exhibits", lambda _run: [])
    monkeypatch.setattr("preln.report.build._figure_files", lambda _run, _shown: made)


@pytest.fixture(scope="session")
def undisturbed(prepared, tmp_path_factory):
    """What a verb writes where nothing goes wrong, and how many writes that takes: by verb, made once."""
    known = {}

    def whole(verb, disk):
        if verb not in known:
            folder = tmp_path_factory.mktemp(f"whole-{verb}")
            with disk.after(-1, folder):
                words = commands.commands(prepared)[verb]
                assert cli.main([*words, "--out", str(folder / "out")]) == 0
            known[verb] = commands.results(folder / "out"), disk.count
        return known[verb]

    return whole


@pytest.fixture(scope="session")
def disk():
    return commands.FullDisk()
