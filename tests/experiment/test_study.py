import copy

import pytest

from preln.base.errors import InputError
from preln.experiment import read_study
from preln.experiment.study_file import study_text


def test_a_study_reads_and_resolves_to_itself(study_values, write_yaml, tmp_path):
    study = read_study(write_yaml(study_values))
    assert study.heal[0].checkpoint_every == 1
    again = tmp_path / "again.yaml"
    again.write_text(study_text(study), encoding="utf-8")
    assert read_study(again) == study


def test_rates_and_seeds_make_a_grid(study_values, write_yaml):
    study_values["heal"][1] |= {"learning_rate": [1e-5, 1e-3], "seeds": [0, 3]}
    single, *grid = read_study(write_yaml(study_values)).heal_runs
    assert (single.name, single.group, single.learning_rate, single.seed) == (
        "partial-3",
        "partial-3",
        1e-5,
        0,
    )
    assert [(run.name, run.group) for run in grid] == [
        ("lora-1e-05-s0", "lora-1e-05"),
        ("lora-1e-05-s3", "lora-1e-05"),
        ("lora-0.001-s0", "lora-0.001"),
        ("lora-0.001-s3", "lora-0.001"),
    ]
    assert [(run.learning_rate, run.seed) for run in grid] == [(1e-5, 0), (1e-5, 3), (1e-3, 0), (1e-3, 3)]


def test_tasks_want_weights_that_are_kept(study_values, write_yaml):
    study_values["tasks"] = {"names": ["piqa"], "models": ["reverse-2-lora"]}
    read_study(write_yaml(study_values))
    study_values["heal"][1]["keep_weights"] = False
    with pytest.raises(InputError, match="are not kept"):
        read_study(write_yaml(study_values))


def test_one_hypothesis_may_be_decided_by_several_models(study_values, write_yaml):
    partial = study_values["hypotheses"][8]
    study_values["hypotheses"] += [{**partial, "model": "reverse-2"}]
    assert len(read_study(write_yaml(study_values)).hypotheses) == 10
    study_values["hypotheses"] += [{**partial, "model": "reverse-2"}]
    with pytest.raises(InputError, match="listed twice"):
        read_study(write_yaml(study_values))


def test_a_spread_model_is_measured_and_not_healed(study_values, write_yaml):
    study_values["device_map"] = "auto"
    with pytest.raises(InputError, match="--shard on"):
        read_study(write_yaml(study_values))
    study_values["heal"] = []
    assert read_study(write_yaml(study_values)).device_map == "auto"


def change(values, path, value):
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["prnue"], 1, "prnue: unknown key"),
        (["data", "calibration", "lenght"], 1, r"data\.calibration\.lenght: unknown key"),
        (["data", "calibration", "sequences"], 1, r"data\.calibration\.sequences"),
        (["data", "calibration", "sequences"], "4", r"data\.calibration\.sequences"),
        (["heal", 0, "models"], ["magnitude-2"], "none of the pruned models"),
        (["heal", 1, "recipe"], "partial-3", "would run twice"),
        (["prune", "metrics"], ["reverse", "reverse"], "named twice"),
        (["tasks"], {"names": ["piqa"], "models": ["nobody"]}, "no model of this study"),
        (["hypotheses", 0, "id"], "HYP-NONE", "HYP-NONE cannot be decided"),
        (["hypotheses", 0, "statistic"], "guess", "no statistic 'guess'"),
        (["hypotheses", 0, "direction"], "left", r"hypotheses\.0\.direction"),
        (["hypotheses", 0, "model"], "reverse-2", "not about one pruned model"),
        (["hypotheses", 8, "model"], "reverse-3", "none of the pruned models"),
        (["prune", "probe"], ["reverse-3"], "none of the pruned models"),
        (["heal", 0, "learning_rate"], [1e-5, -1.0], r"heal\.0\.learning_rate"),
        (["heal", 0, "learning_rate"], [1e-5, 1e-5], "would run twice"),
        (["heal", 0, "seeds"], [0, 0], "would run twice"),
        (["prune", "metrics"], ["reverse", "block_influence", "revrese"], "revrese"),
        (["heal", 1, "recipe"], "lroa", "lroa"),
        (["name"], None, "name"),
    ],
)
def test_a_bad_study_is_refused_in_one_line(study_values, write_yaml, path, value, message):
    with pytest.raises(InputError, match=message) as error:
        read_study(write_yaml(change(study_values, path, value)))
    assert "\n" not in str(error.value)
    assert "study.yaml" in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\xff\xfe"])
def test_what_is_no_study_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"x\.yaml"):
        read_study(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        read_study(tmp_path)
