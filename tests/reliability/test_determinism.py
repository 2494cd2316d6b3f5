"""The same study twice is the same bytes; batch size and threads move numbers by rounding alone."""

import copy
import itertools

import pytest
import torch

import preln
from preln import cli
from preln.base.errors import InputError
from preln.evaluate import perplexity
from preln.models import tiny_model
from preln.report.figures import exhibits

from . import commands

pytestmark = pytest.mark.integration
BENCHMARK = "determinism"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_batch_size_and_threads_move_numbers_by_rounding_alone(dtype, benchmark):
    kind = getattr(torch, dtype)
    found = benchmark.moved(kind)
    assert found.again == 0 and found.ranks
    assert 0 < found.others <= found.bound == benchmark.BOUNDS[kind]


def test_what_differs_is_seen(benchmark):
    usual = benchmark.measured(torch.float32, *benchmark.USUAL)
    for name, share in (("layers", 1e-5), ("scores", 1e-5), ("weights", 1e-2)):
        other = copy.deepcopy(usual)
        if name == "layers":
            other.layers.iloc[other.layers.abs().argmax()] *= 1 + share
        elif name == "scores":
            other.scores.loc[:, "score"] = other.scores["score"] * (1 + share)
        else:
            largest = max(other.weights, key=torch.numel)
            largest *= 1 + share
        assert benchmark.worst(usual, other) == pytest.approx(share, rel=1e-2)


def ids():
    return torch.randint(1, 512, (8, 48), generator=torch.Generator().manual_seed(0))


def timeless(path):
    """What a file of a report holds, without the seconds and bytes that two of its tables tell."""
    name, content = path.stem, path.read_bytes()
    if name not in ("costs", "outcomes"):
        return content
    comma = b"," if path.suffix == ".csv" else b"&"
    rows = [line.split(comma) for line in content.splitlines()]
    return [row[:2] if name == "costs" else row[:-1] for row in rows if len(row) > 2]


def test_the_same_study_twice_is_the_same_bytes(prepared, tmp_path, monkeypatch):
    """Of the figures two are drawn, the slowest part of a report."""
    monkeypatch.setattr("preln.report.build.exhibits", lambda run: list(itertools.islice(exhibits(run), 2)))
    words = commands.commands(prepared)["run"]
    assert cli.main([*words, "--out", str(tmp_path / "second")]) == 0
    assert commands.results(tmp_path / "second") == commands.results(prepared / "run")
    for name, run in (("a", prepared / "run"), ("b", tmp_path / "second")):
        assert cli.main(["report", str(run), "--out", str(tmp_path / name)]) == 0
    names = [
        sorted(p.relative_to(tmp_path / side).as_posix() for p in (tmp_path / side).rglob("*.*"))
        for side in "ab"
    ]
    assert names[0] == names[1]
    same = [name for name in names[0] if name.startswith(("tables/", "figures/"))]
    assert any(name.endswith(".pdf") for name in same) and any(name.endswith(".tex") for name in same)
    assert [n for n in same if timeless(tmp_path / "a" / n) != timeless(tmp_path / "b" / n)] == []


def test_another_seed_is_another_result(prepared, tmp_path):
    words = commands.commands(prepared)["run"]
    assert cli.main([*words, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    assert commands.results(tmp_path / "other") != commands.results(prepared / "run")


def broken(kind):
    """A model with NaN in block 2, or one whose block 2 overflows float16 and no wider dtype."""
    model = tiny_model("llama", blocks=4).eval()
    part = (
        model.model.layers[2].self_attn.o_proj if kind == "attention" else model.model.layers[2].mlp.down_proj
    )
    with torch.no_grad():
        if kind == "overflow":
            for name in ("down_proj", "up_proj", "gate_proj"):
                getattr(model.model.layers[2].mlp, name).weight.mul_(6e2)
            return model.half()
        part.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("kind", ["attention", "mlp", "overflow"])
def test_what_is_not_finite_is_named_by_block_and_site(kind):
    model = broken(kind)
    site = "block" if kind == "overflow" else kind
    with pytest.raises(InputError, match=rf"^block 2, {site}: values are not finite"):
        preln.probe(model, ids())
    for metric in ("block_influence", "angular", "taylor", "perplexity", "sleb"):
        with pytest.raises(InputError, match=r"block 2: .*not finite"):
            preln.score(model, ids(), metrics=[metric])
    with pytest.raises(InputError, match="not finite"):
        perplexity(model, ids())
    with pytest.raises(InputError, match="not finite at step 1"):
        preln.heal(model, ids(), recipe="partial-1", steps=2, batch_size=4)
    if kind == "overflow":
        assert len(preln.probe(model.float(), ids()))  # the weights are right, the dtype was too narrow


def test_numbers_that_are_not_finite_leave_no_file(tmp_path, capsys):
    model = broken("overflow").float()
    model.save_pretrained(tmp_path / "model")
    from preln.models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "model")
    commands.corpus(tmp_path)
    data = ["--data", str(tmp_path / "text.jsonl"), "--sequences", "4", "--length", "16"]
    for verb in (["probe"], ["score", "--metrics", "block_influence"], ["evaluate"]):
        capsys.readouterr()
        words = [verb[0], str(tmp_path / "model"), *data, *verb[1:], "--out", str(tmp_path / "out")]
        assert cli.main([*words, "--dtype", "float16"]) == 2
        line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("preln: "))
        assert "not finite" in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.jsonl"]
    assert cli.main([*words, "--dtype", "float32"]) == 0
