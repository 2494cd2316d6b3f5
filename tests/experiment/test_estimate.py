"""What a study will take: against committed runs, against torch's own counter, and where it must differ."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from preln.base.errors import InputError
from preln.base.files import read_json
from preln.cli import main
from preln.experiment import read_study
from preln.experiment.estimate.estimate import estimate, seconds, side_by_side, table
from preln.experiment.estimate.hardware import HARDWARE, Hardware, find_hardware
from preln.experiment.estimate.scoring_load import alone, gathering
from preln.experiment.estimate.task_tokens import TASKS, task_tokens
from preln.experiment.estimate.workload import Load, Windows, backward, forward, left_out, shape_of
from preln.experiment.outline import outline
from preln.experiment.published import published_table, read_published
from preln.models import tiny_model
from preln.models.configs import table as configs
from preln.prune import leave_one_out, score

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2] / "experiments"
RUN = ROOT / "results" / "quickstart"
READY = sorted((ROOT / "ready").glob("*.yaml"))
PUBLISHED = sorted((ROOT / "published").glob("*.yaml"))
SLOW = Hardware("slow", "cpu", {"float32": 1e9}, bandwidth=1e9, memory=1e12)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def quickstart():
    """Estimated rows by step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return {row["id"]: row for row in estimate(read_study(RUN / "config.yaml"), "cpu-2")["steps"]}


def within(estimated, measured, factor=1.5):
    return measured / factor <= estimated <= measured * factor


def test_every_step_of_the_committed_run_took_what_is_estimated(quickstart):
    measured = {p.parent.name: read_json(p)["seconds"] for p in RUN.glob("*/step.json")}
    assert set(measured) == set(quickstart)
    slow = {name: value for name, value in measured.items() if value > 2.0}
    assert {quickstart[name]["kind"] for name in slow} >= {"probe", "score", "damage", "prune", "heal"}
    off = {
        n: (quickstart[n]["seconds"], m) for n, m in slow.items() if not within(quickstart[n]["seconds"], m)
    }
    assert not off
    total = sum(quickstart[name]["seconds"] for name in measured)
    assert within(total, sum(measured.values()), 1.15)


def test_healing_took_the_memory_that_is_estimated(quickstart):
    peaks = {p.parent.name: read_json(p)["peak_memory_bytes"] for p in RUN.glob("heal-*/result.json")}
    assert len(peaks) == 5
    off = {
        n: (quickstart[n]["memory"], m) for n, m in peaks.items() if not within(quickstart[n]["memory"], m)
    }
    assert not off


def test_the_recipes_come_out_in_their_measured_order(quickstart):
    lora, partial = (quickstart[f"heal-reverse-8-{name}"]["seconds"] for name in ("lora", "partial-3"))
    assert 1.2 < lora / partial < 2.0  # measured: 1.6 to 1.7


@pytest.mark.parametrize("times", [0.4, 2.5])
def test_the_comparison_would_notice_another_machine(quickstart, times):
    known = HARDWARE["cpu-2"]
    rates = {dtype: times * rate for dtype, rate in known.rates.items()}
    other = replace(known, rates=rates, bandwidth=times * known.bandwidth)
    rows = estimate(read_study(RUN / "config.yaml"), other)["steps"]
    slow = [row for row in rows if row["kind"] in ("score", "damage", "heal")]
    assert not any(within(r["seconds"], read_json(RUN / r["id"] / "step.json")["seconds"]) for r in slow)


def test_a_formula_without_attention_is_off(eager):
    ids = torch.randint(1, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    blind = replace(shape_of(eager), heads=0.0)
    assert forward(blind, Windows(4, 24)).operations < 0.98 * counted(lambda: eager(ids))


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def eager():
    """A model whose attention is plain products, which torch's counter sees."""
    return tiny_model("llama", blocks=5, attn_implementation="eager")


def test_a_pass_has_the_products_that_torch_counts(eager):
    ids = torch.randint(1, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    shape, rows = shape_of(eager), Windows(4, 24)
    # rotation of positions and sums are no part of the formula
    assert forward(shape, rows).operations == pytest.approx(counted(lambda: eager(ids)), rel=0.01)

    def train():
        eager(ids, labels=ids).loss.backward()
        eager.zero_grad()

    whole = forward(shape, rows).operations + backward(shape, rows, weights=True).operations
    assert whole == pytest.approx(counted(train), rel=0.01)
    assert shape.parameters == sum(p.numel() for p in eager.parameters())


def test_leaving_blocks_out_has_the_products_that_torch_counts(eager):
    ids = torch.randint(1, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    shape, rows = shape_of(eager), Windows(4, 24)
    load, _ = gathering(shape, rows, frozenset({"left_out"}))
    # the last token of a sequence predicts nothing, so the head sees 23 of 24
    assert counted(lambda: leave_one_out(eager, ids)) == pytest.approx(load.operations, rel=0.06)
    by_states, _ = gathering(shape, rows, frozenset({"states"}))
    assert counted(lambda: score(eager, ids, ["block_influence"])) == pytest.approx(
        by_states.operations, rel=0.06
    )
    assert load.operations > 3 * by_states.operations


def test_what_the_criteria_take_goes_up_with_what_they_do(eager):
    shape, rows = shape_of(eager), Windows(4, 24)
    none, _ = gathering(shape, rows, frozenset())
    kinds = [frozenset({name}) for name in ("states", "gradients", "weight_gradients")]
    costs = [none.operations, *(gathering(shape, rows, kind)[0].operations for kind in kinds)]
    assert costs[0] == 0
    assert costs == sorted(set(costs))
    # removing one at a time is scoring smaller and smaller models
    again, _ = alone("perplexity@1", frozenset({"left_out"}), shape, rows, 2)
    twice = gathering(shape, rows, frozenset({"left_out"}))[0]
    twice += gathering(shape.without(1), rows, frozenset({"left_out"}))[0]
    assert again == twice
    greedy, _ = alone("sleb", frozenset({"left_out"}), shape, rows, 2)
    assert left_out(shape, rows).operations < greedy.operations < again.operations


def test_loads_add_up_and_time_follows_the_slowest_part():
    load = Load(operations=7e8, moved=2e8, read=1e8, fixed=1.0) * 2
    assert load == Load(operations=1.4e9, moved=4e8, read=2e8, fixed=2.0)
    assert seconds(load, SLOW, "float32") == pytest.approx(1.4 / 0.7 + 0.4 + 2.0)
    assert seconds(Load(read=3e9), SLOW, "float32") == pytest.approx(3.0)  # weights that are only read
    assert seconds(Load(operations=1.0, calls=1000), SLOW, "float32") == pytest.approx(0.5)
    assert seconds(load, SLOW, "float32", shared=2) < seconds(load, SLOW, "float32")


def test_a_larger_study_takes_more(study_values, write_yaml):
    def totals(change):
        values = json.loads(json.dumps(study_values))
        change(values)
        return estimate(read_study(write_yaml(values)), "cpu-2")["totals"]

    base = totals(lambda v: None)
    longer = totals(lambda v: v["heal"][0].update(steps=40))
    deeper = totals(lambda v: v.update(model="tiny:llama:12"))
    thrown = totals(lambda v: [each.update(keep_weights=False) for each in v["heal"]])
    assert longer["operations"] > base["operations"] < deeper["operations"]
    assert longer["seconds"] > base["seconds"]
    assert thrown["disk"] < base["disk"]
    assert thrown["operations"] == base["operations"]


def test_stored_states_are_filled_once_and_make_updates_cheaper(study_values, write_yaml):
    heal = {"recipe": "partial-1", "models": ["reverse-2"], "learning_rate": [1e-5, 1e-4, 1e-3]}
    study_values["heal"] = [heal | {"steps": 30, "batch_size": 4, "eval_every": 30}]
    steps = estimate(read_study(write_yaml(study_values)), "cpu-2")["steps"]
    first, *rest = [row["operations"] for row in steps if row["kind"] == "heal"]
    assert len(set(rest)) == 1 and rest[0] < first
    held = [row["stored"] for row in steps if row["kind"] == "heal"]
    assert held == [(12 + 2) * 32 * 64 * 4, 0, 0]  # rows, tokens, width and bytes of the one depth
    study_values["heal"][0]["steps"] = 3  # every row comes once: nothing is stored
    short = [
        r for r in estimate(read_study(write_yaml(study_values)), "cpu-2")["steps"] if r["kind"] == "heal"
    ]
    assert len({row["operations"] for row in short}) == 1
    assert short[0]["operations"] / 3 > rest[0] / 30


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_studies_are_valid(path):
    study = read_study(path)
    assert study.model in configs()
    assert study.name == f"ready-{path.stem}"
    assert study.tasks is not None and len(study.tasks.names) == 8
    assert all(run.recipe.startswith(("reassess-", "uidl-")) for run in study.heal_runs)
    blocks = configs()[study.model]["config"]["num_hidden_layers"]
    assert study.prune.drop == (blocks // 4, blocks // 2)[: len(study.prune.drop)]


def test_there_is_a_ready_study_for_each_of_the_nine_models():
    assert len({read_study(path).model for path in READY}) == len(READY) == 9


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct", "gemma-2-2b-it"])
def test_eight_devices_take_the_same_work_and_less_time(name):
    study = read_study(ROOT / "ready" / f"{name}.yaml")
    one, eight = (estimate(study, machine) for machine in ("h100-80gb", "8xh100-80gb"))
    assert [row["id"] for row in one["steps"]] == [step.id for step in outline(study)]
    assert one["totals"]["operations"] == eight["totals"]["operations"]
    assert one["totals"]["fits"]
    assert one["totals"]["seconds_side_by_side"] == pytest.approx(one["totals"]["seconds"])
    ratio = eight["totals"]["seconds"] / eight["totals"]["seconds_side_by_side"]
    assert 4 < ratio <= 8
    # no product runs faster than the data sheet says
    assert one["totals"]["operations"] / one["totals"]["seconds"] < HARDWARE["h100-80gb"].rate("bfloat16")


def test_what_does_not_fit_one_device_says_so_and_how_to_mend_it():
    study = read_study(ROOT / "ready" / "llama-2-70b.yaml")
    one, eight = (estimate(study, machine) for machine in ("h100-80gb", "8xh100-80gb"))
    assert not one["totals"]["fits"] and eight["totals"]["fits"]
    by_kind = {row["kind"]: row for row in one["steps"]}
    assert by_kind["probe"]["devices"] > 1 and "--device auto" in by_kind["probe"]["notes"][0]
    assert "--shard on" in by_kind["heal"]["notes"][0]
    assert by_kind["decide"]["devices"] == 1 and not by_kind["decide"]["notes"]
    assert "does not fit one device of 80 GB" in table(one)


def test_side_by_side_waits_for_what_a_step_needs(quickstart):
    from preln.experiment.estimate.estimate import Row

    def row(name, spent, devices=1):
        return Row(name, "heal", 0.0, 0.0, 0.0, 0.0, 0.0, spent, devices, True, ())

    rows = [row("a", 2.0), row("b", 3.0), row("c", 4.0, 2)]
    free = {"a": (), "b": (), "c": ()}
    assert side_by_side(rows, free, 1) == 9.0
    assert side_by_side(rows, free, 4) == 4.0
    assert side_by_side(rows, free, 2) == 7.0  # c wants both devices
    assert side_by_side(rows[:2], {"a": (), "b": ("a",)}, 8) == 5.0


def test_the_counted_tokens_follow_the_limit():
    assert task_tokens("piqa").total(16) == pytest.approx(16 * 61.1)
    assert task_tokens("hellaswag").total(None) == pytest.approx(10042 * 322.4)
    assert task_tokens("mmlu").evaluated(1000) == 14042
    assert not task_tokens("cmmlu").measured and not task_tokens("unheard_of").measured
    for known in TASKS.values():
        totals = [known.total(limit) for limit in (1, 16, 100, 1000, None)]
        assert totals == sorted(totals)


def test_the_table_ends_in_totals_and_the_command_prints_json(study_values, write_yaml, tmp_path, capsys):
    path = str(write_yaml(study_values))
    out = tmp_path / "out"
    assert main(["estimate", path, "--hardware", "cpu-2", "--out", str(out), "--json"]) == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    said = json.loads(last)
    assert said == read_json(out / "estimate.json")
    assert any(line.startswith("total") for line in lines)
    assert said["config_from"] == "tiny" and said["hardware"]["name"] == "cpu-2"
    assert said["totals"]["disk"] == sum(row["disk"] for row in said["steps"])


def test_this_machine_is_measured():
    here = find_hardware("here", "float32")
    assert here.rate("float32") > 1e9 and here.bandwidth > 1e8 and here.memory > 1e9


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--hardware", "h1000"], "h1000.*choose here or one of cpu-2, rtx-4090"),
        ({"model": "nobody/nothing-7b"}, ["--hardware", "cpu-2"], "nobody/nothing-7b: no configuration"),
        ({"dtype": "float16"}, ["--hardware", "cpu-2"], "no matrix-product rate for float16"),
        ({"model": "tiny:llama:2"}, ["--hardware", "cpu-2"], "prune.drop: 2 of 2 blocks"),
    ],
)
def test_bad_input_is_one_line(study_values, write_yaml, capsys, change, arguments, message):
    assert main(["estimate", str(write_yaml(study_values | change)), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    assert re.search(message, said.err)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_files_are_valid(path):
    found = read_published(path)
    for number in found.numbers:
        if len(number.tasks) == 8:  # the average is the plain mean of its tasks
            assert sum(number.tasks.values()) / 8 == pytest.approx(number.value, abs=6e-5)
    assert found.confirmed == (path.stem != "uidl-retold")


def test_published_numbers_that_decide_the_claims_are_there():
    numbers = published_table(PUBLISHED)
    llama = numbers[(numbers["model"] == "meta-llama/Llama-3.1-8B-Instruct") & (numbers["share"] == 0.25)]
    by_recipe = llama[
        (llama["metric"] == "reverse") & llama["method"].isna() & (llama["statistic"] == "mean_acc")
    ]
    values = dict(zip(by_recipe["recipe"], by_recipe["value"], strict=True))
    assert values["reassess-lora"] == 0.5268 and values["reassess-partial-3"] == 0.5807
    assert set(numbers["statistic"]) >= {"collapse_share", "heal_seconds", "retention"}
    assert not numbers[numbers["statistic"] == "retention"]["confirmed"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("value: 0.5484", "value: 5.484"), "out of range"),
        (("metric: taylor", "metric: taylr"), "no criterion"),
        (("recipe: reassess-lora", "recipe: reassess-lore"), "reassess-lore.*unknown"),
        (("confirmed: true", "confirmd: true"), "confirmd|confirmed"),
        (("name: reassessing", "name: other"), "not that of the file"),
        (("value: 0.2955, metric: taylor", "value: 0.2955, metric: reverse"), "stands there twice"),
    ],
)
def test_a_published_file_with_a_mistake_is_refused(tmp_path, change, message):
    text = (ROOT / "published" / "reassessing.yaml").read_text(encoding="utf-8")
    assert change[0] in text
    path = tmp_path / "reassessing.yaml"
    path.write_text(text.replace(change[0], change[1], 1), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_published(path)
    assert "\n" not in str(caught.value)
