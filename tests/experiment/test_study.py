import copy

import pytest

from preln.base.errors import InputError
from preln.experiment import read_study
from preln.experiment.study import study_text


def test_a_study_reads_and_resolves_to_itself(study_values, write_yaml, tmp_path):
    study = read_study(write_yaml(study_values))
    assert study.heal[0].checkpoint_every == 1
    again = tmp_path / "again.yaml"
    again.write_text(study_text(study), encoding="utf-8")
    assert read_study(again) == study


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
