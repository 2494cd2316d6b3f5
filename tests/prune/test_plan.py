from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.prune import (
    PRESETS,
    Plan,
    make_plan,
    parse_layers,
    plan_layers,
    protected_blocks,
    read_plan,
    write_plan,
)


def table(values):
    order = sorted(range(len(values)), key=lambda i: values[i])
    rank = [order.index(i) for i in range(len(values))]
    return pd.DataFrame({"metric": "m", "layer": range(len(values)), "score": values, "rank": rank})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", [3]), ("3,4,20-23", [3, 4, 20, 21, 22]), (" 5 , 1-3 ", [1, 2, 5]), ("0-1", [0])],
)
def test_layers_are_half_open(text, expected):
    assert parse_layers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5a", ["5a"]),
        ("6m,5a,1", [1, "5a", "6m"]),
        ("3, 20-23a ", [3, "20a", "21a", "22a"]),
        ("2m,2a", ["2a", "2m"]),
    ],
)
def test_halves_are_named_by_a_letter(text, expected):
    assert parse_layers(text) == expected
    plan = plan_layers(expected, 30)
    assert plan.drop_attention == tuple(int(e[:-1]) for e in expected if str(e).endswith("a"))
    assert plan.drop_mlp == tuple(int(e[:-1]) for e in expected if str(e).endswith("m"))


@pytest.mark.parametrize("text", ["5b", "a5", "5am", "1a,1a", "1-3a,2a", "5.attention", "a-b"])
def test_bad_halves_are_refused_in_one_line(text):
    with pytest.raises(InputError, match="layers") as error:
        parse_layers(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "a", "3,", "-1", "3-3", "5-2", "1,1", "1-3,2", "1.5", "3-", "0-999999999", "²"]
)
def test_bad_layers_are_refused_in_one_line(text):
    with pytest.raises(InputError) as error:
        parse_layers(text)
    assert "\n" not in str(error.value)


@given(st.sets(st.integers(0, 40), min_size=1, max_size=12))
def test_layers_round_trip(blocks):
    assert parse_layers(",".join(map(str, blocks))) == sorted(blocks)


def test_presets():
    assert protected_blocks("none", 10) == set()
    assert protected_blocks("uidl", 10) == {9}
    assert protected_blocks("sleb", 10) == {0, 9}
    assert protected_blocks("shortened-plus", 10) == {0, 1, 2, 3, 8, 9}
    assert protected_blocks("finercut", 10) == {0, 1, 2, 3}
    assert all(protected_blocks(name, n) <= set(range(n)) for name in PRESETS for n in range(1, 6))
    with pytest.raises(InputError, match="unknown"):
        protected_blocks("nonsense", 4)


def test_the_lowest_unprotected_scores_go():
    scores = table([0.0, 5.0, 1.0, 2.0, 9.0, 0.5])
    assert make_plan(scores, "m", drop=2).drop == (0, 5)
    assert make_plan(scores, "m", drop=2, protect="sleb").drop == (2, 3)
    plan = make_plan(scores, "m", drop=2, protect="sleb", tokens="abc", model="x")
    assert plan.keep == (0, 1, 4, 5) and plan.scores == (0.0, 5.0, 1.0, 2.0, 9.0, 0.5)
    assert "counted from 0: 2, 3" in plan.describe()


@pytest.mark.parametrize("drop", [0, -1, 6, 7, True])
def test_drop_must_leave_something(drop):
    with pytest.raises(InputError):
        make_plan(table([0.0, 5.0, 1.0, 2.0, 9.0, 0.5]), "m", drop=drop)


def test_protection_can_leave_too_few():
    with pytest.raises(InputError, match="leaves only 4"):
        make_plan(table([0.0, 5.0, 1.0, 2.0, 9.0, 0.5]), "m", drop=5, protect="sleb")
    with pytest.raises(InputError, match="no scores"):
        make_plan(table([0.0, 1.0]), "other", drop=1)


@pytest.mark.parametrize(
    "layers",
    [
        [4],
        [-1],
        [1, 1],
        [0, 1, 2, 3],
        [],
        ["4a"],
        ["1a", "1a"],
        [1, "1m"],
        ["1x"],
        [0, 1, 2, "3a", "3m"],
        [True],
    ],
)
def test_layers_by_hand_must_make_sense(layers):
    with pytest.raises(InputError):
        plan_layers(layers, 4)


def test_protected_layers_by_hand_are_refused():
    with pytest.raises(InputError, match="block 3 is protected"):
        plan_layers([3], 4, protect="uidl")


def test_protected_halves_are_refused():
    with pytest.raises(InputError, match="block 3 is protected"):
        plan_layers(["3m"], 4, protect="uidl")


def test_one_half_of_every_block_may_go():
    plan = plan_layers(["0a", "1a", "2a", "3a", "0m"], 4)
    assert plan.drop == () and plan.keep == (0, 1, 2, 3)
    assert plan.describe() == (
        "removes no whole block; removes the attention of 0, 1, 2, 3; removes the MLP of 0; keeps 0, 1, 2, 3"
    )
    mixed = plan_layers([1, "2a"], 4).describe()
    assert "removes 1 of 4 blocks, counted from 0: 1; removes the attention of 2; keeps 0, 2, 3" in mixed


def test_a_plan_without_halves_or_method_is_written_as_before(tmp_path):
    write_plan(plan_layers([2, 1], 4, model="some/model"), tmp_path / "plan.yaml")
    before = (
        "model: some/model\nnum_blocks: 4\ndrop: [1, 2]\nmetric: null\nscores: null\n"
        "protect: none\ntokens: null\n"
    )
    assert (tmp_path / "plan.yaml").read_text() == before
    assert read_plan(tmp_path / "plan.yaml").method == "remove"


PLAIN = st.one_of(st.integers(0, 9), st.floats(0, 9), st.text("abc+ ", max_size=5))


@given(
    st.sets(st.integers(0, 9), max_size=5),
    st.sets(st.integers(0, 9), max_size=5),
    st.dictionaries(st.sampled_from("abcd"), PLAIN, max_size=4),
)
def test_equal_plans_are_equal_bytes_and_come_back(tmp_path_factory, attention, mlp, settings):
    folder = tmp_path_factory.mktemp("plans")
    halves = {"drop_attention": tuple(sorted(attention)), "drop_mlp": tuple(sorted(mlp))}
    plans = [Plan(num_blocks=11, drop=(10,), **halves)]
    plans += [
        Plan(num_blocks=11, drop=(1,), method="laco", settings=dict(pairs(settings)))
        for pairs in (
            lambda d: d.items(),
            lambda d: reversed(d.items()),
            lambda d: ((k, _as_float(v)) for k, v in d.items()),
        )
    ]
    for number, plan in enumerate(plans):
        write_plan(plan, folder / f"{number}.yaml")
        again = read_plan(folder / f"{number}.yaml")
        assert again == plan
        write_plan(again, folder / "again.yaml")
        assert (folder / "again.yaml").read_bytes() == (folder / f"{number}.yaml").read_bytes()
    assert plans[1] == plans[2] == plans[3]
    texts = {(folder / f"{number}.yaml").read_bytes() for number in (1, 2, 3)}
    assert len(texts) == 1


def _as_float(value):
    return float(value) if isinstance(value, int) else value


def test_yaml_round_trip_and_equal_bytes(tmp_path):
    plan = make_plan(table([0.1, 0.25, 1 / 3, 1e-9]), "m", drop=2, tokens="f00", model="some/model")
    write_plan(plan, tmp_path / "a.yaml")
    again = read_plan(tmp_path / "a.yaml")
    assert again == plan
    write_plan(again, tmp_path / "b.yaml")
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("num_blocks: 4\ndrop: [1]\nbogus: 1\n", "unknown key 'bogus'"),
        ("num_blocks: 4\ndrop: [4]\n", "out of range"),
        ("num_blocks: 4\ndrop: [2, 1]\n", "ascending"),
        ("num_blocks: 4\ndrop: [1, 1]\n", "twice"),
        ("num_blocks: 4\ndrop: []\n", "no block"),
        ("num_blocks: 2\ndrop: [0, 1]\n", "all 2 blocks"),
        ("num_blocks: 4\n", "drop"),
        ("num_blocks: 4\ndrop: [1]\nscores: [1.0]\n", "1 scores"),
        ("num_blocks: 4\ndrop: [1]\nprotect: bogus\n", "unknown"),
        ("num_blocks: 4\ndrop: [1]\ndrop_mlp: [1]\n", "goes as a whole"),
        ("num_blocks: 4\ndrop: []\ndrop_mlp: [2, 1]\n", "ascending"),
        ("num_blocks: 4\ndrop: []\ndrop_attention: [4]\n", "out of range"),
        ("num_blocks: 4\ndrop: []\ndrop_attention: [-1]\n", "out of range"),
        ("num_blocks: 1\ndrop: []\ndrop_attention: [0]\ndrop_mlp: [0]\n", "at least one half"),
        ("num_blocks: 4\ndrop: [1]\nmethod: laco\ndrop_mlp: [2]\n", "whole blocks"),
        ("num_blocks: 4\ndrop: [1]\nsettings: {a: 1}\n", "removal has none"),
        ("num_blocks: 4\ndrop: [1]\nmethod: laco\nsettings: {a: true}\n", "settings"),
        ("num_blocks: 4\ndrop: [1]\nmethod: laco\nsettings: 3\n", "settings"),
        ("- 1\n", "not a mapping"),
        ("a: [", "YAML"),
        ("!!python/object/apply:os.system [echo]", "YAML"),
        ("1: 2\n", "words"),
    ],
)
def test_bad_plans_are_one_line(tmp_path, text, line):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=line) as error:
        read_plan(path)
    assert "\n" not in str(error.value)


def test_a_missing_plan(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_plan(tmp_path / "absent.yaml")


def test_a_plan_is_frozen():
    plan = Plan(num_blocks=4, drop=(1,))
    with pytest.raises(ValueError, match="frozen"):
        plan.metric = "x"
