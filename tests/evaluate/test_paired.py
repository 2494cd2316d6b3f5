from __future__ import annotations

from math import comb

import numpy as np
import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.evaluate.paired import (
    MEAN,
    compare_documents,
    compare_results,
    compare_several,
    groups_of,
    holm,
    mcnemar,
    mean_difference,
)


def _frame(**tasks):
    rows = [
        {"task": task, "doc_id": i, "doc_hash": f"{task}-{i}", "acc": float(value), "acc_norm": np.nan}
        for task, values in tasks.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def _outcomes(n, accuracy, flips, seed):
    """Two models' outcomes, the second a copy of the first with a share of documents flipped."""
    generator = np.random.default_rng(seed)
    first = generator.random(n) < accuracy
    return first, np.where(generator.random(n) < flips, ~first, first)


def _two(seed=0):
    easy, hard = _outcomes(200, 0.8, 0.15, seed), _outcomes(120, 0.4, 0.1, seed + 1)
    return _frame(easy=easy[0], hard=hard[0]), _frame(easy=easy[1], hard=hard[1])


def _brute_force(b, c):
    """Two-sided binomial test: the probability of every count that is no likelier than b."""
    n = b + c
    probabilities = [comb(n, k) / 2**n for k in range(n + 1)]
    return min(1.0, sum(p for p in probabilities if p <= probabilities[b] * (1 + 1e-9)))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (0, 6), (9, 2), (14, 30)])
def test_mcnemar_is_the_sum_of_binomial_probabilities(b, c):
    assert mcnemar(b, c) == pytest.approx(_brute_force(b, c), rel=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_differences_and_counts_are_those_of_a_loop_over_documents():
    first, second = _two()
    table = compare_documents(first, second).set_index("task")
    for task in ("easy", "hard"):
        pairs = list(zip(first[first.task == task].acc, second[second.task == task].acc, strict=True))
        row = table.loc[task]
        assert row["n"] == len(pairs)
        assert row["first_only"] == sum(a > b for a, b in pairs)
        assert row["second_only"] == sum(a < b for a, b in pairs)
        assert row["difference"] == pytest.approx(sum(b - a for a, b in pairs) / len(pairs))
        assert row["second"] - row["first"] == pytest.approx(row["difference"])
        assert row["p"] == pytest.approx(_brute_force(int(row["first_only"]), int(row["second_only"])))
    last = table.loc[MEAN]
    assert last["difference"] == pytest.approx(
        (table["difference"]["easy"] + table["difference"]["hard"]) / 2
    )
    assert last["first_only"] == table["first_only"]["easy"] + table["first_only"]["hard"]
    # the plain mean of tasks is not the mean of documents
    assert abs(last["difference"] - (second.acc.mean() - first.acc.mean())) > 1e-4


def test_intervals_agree_with_a_slow_bootstrap_that_draws_indices():
    first, second = _two()
    table = compare_documents(first, second, draws=20_000).set_index("task")
    generator = np.random.default_rng(7)
    drawn = {}
    for task in ("easy", "hard"):
        d = (second[second.task == task].acc - first[first.task == task].acc).to_numpy()
        drawn[task] = np.array([d[generator.integers(0, len(d), len(d))].mean() for _ in range(5000)])
    drawn[MEAN] = (drawn["easy"] + drawn["hard"]) / 2
    for task, means in drawn.items():
        low, high = np.quantile(means, [0.025, 0.975])
        # quantiles of steps of 1/n, and Monte Carlo error of 5,000 draws
        assert table["low"][task] == pytest.approx(low, abs=0.25 * means.std())
        assert table["high"][task] == pytest.approx(high, abs=0.25 * means.std())
        assert table["low"][task] < table["difference"][task] < table["high"][task]


def test_swapping_the_models_turns_the_sign():
    first, second = _two()
    one, other = compare_documents(first, second), compare_documents(second, first)
    assert np.allclose(one["difference"], -other["difference"])
    assert one["first_only"].tolist() == other["second_only"].tolist()
    assert np.allclose(one["p"], other["p"])
    assert np.allclose(one["low"], -other["high"], atol=0.02)


def test_a_model_against_itself_differs_nowhere():
    first, _ = _two()
    table = compare_documents(first, first)
    assert (table[["difference", "low", "high", "first_only", "second_only"]] == 0).all(axis=None)
    assert (table["p"] == 1.0).all()


def test_unpaired_averages_would_be_far_less_certain():
    a, b = _outcomes(400, 0.5, 0.05, 3)
    row = compare_documents(_frame(t=a), _frame(t=b)).set_index("task").loc["t"]
    generator = np.random.default_rng(0)
    apart = [
        generator.permutation(b)[generator.integers(0, 400, 400)].mean()
        - a[generator.integers(0, 400, 400)].mean()
        for _ in range(3000)
    ]
    low, high = np.quantile(apart, [0.025, 0.975])
    assert high - low > 2.0 * (row["high"] - row["low"])


def test_order_of_rows_plays_no_part():
    first, second = _two()
    shuffled = second.sample(frac=1.0, random_state=1)
    assert compare_documents(first, shuffled).equals(compare_documents(first, second))


def test_a_group_counts_its_documents_together():
    first = _frame(big=[1] * 30, small=[0] * 10, other=[1, 0] * 5)
    second = _frame(big=[1] * 15 + [0] * 15, small=[1] * 10, other=[1, 0] * 5)
    table = compare_documents(first, second, groups={"both": ["big", "small"]}).set_index("task")
    assert list(table.index) == ["both", "other", MEAN]
    assert table["n"]["both"] == 40
    assert table["difference"]["both"] == pytest.approx((10 - 15) / 40)
    assert table["difference"][MEAN] == pytest.approx((10 - 15) / 40 / 2)


def test_groups_of_a_result_are_resolved_to_single_tasks():
    own = {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["a", "b"], "mmlu_other": ["c"]}
    result = {"tasks": {"mmlu": {}, "piqa": {}}, "lm_eval": {"group_subtasks": own}}
    assert groups_of(result) == {"mmlu": ["a", "b", "c"]}
    first, second = (
        _frame(a=[1, 0], b=[1, 1], c=[0, 0], piqa=[1, 0]),
        _frame(a=[0, 0], b=[1, 1], c=[0, 0], piqa=[1, 1]),
    )
    table = compare_results({**result, "documents": first}, {**result, "documents": second})
    assert table["task"].tolist() == ["mmlu", "piqa", MEAN]
    assert groups_of({"tasks": result["tasks"], "groups": {"mmlu": ["a"]}}) == {"mmlu": ["a"]}
    assert table["difference"].tolist() == pytest.approx([-1 / 6, 0.5, 1 / 6])


def test_groups_without_a_record_are_told_by_their_names():
    sat = ["mmlu_law", "cmmlu_law", "mmlu_virology", "piqa", "piqa_more"]
    found = groups_of({"tasks": {"mmlu": {}, "cmmlu": {}, "piqa": {}}}, sat)
    assert found == {"mmlu": ["mmlu_law", "mmlu_virology"], "cmmlu": ["cmmlu_law"]}
    assert groups_of({"tasks": {"mmlu": {}}}) == {}


def test_the_numbers_of_groups():
    own = {"mmlu": ["a", "b"]}
    result = {"tasks": {"mmlu": {}, "piqa": {}}, "groups": own}
    first, second = _frame(a=[1, 0], b=[1, 1], piqa=[1, 0]), _frame(a=[0, 0], b=[1, 1], piqa=[1, 1])
    table = compare_results({**result, "documents": first}, {**result, "documents": second})
    assert table["difference"].tolist() == pytest.approx([-1 / 4, 0.5, 1 / 8])


def test_holm_is_the_stepwise_rule():
    generator = np.random.default_rng(0)
    for m in (1, 2, 7):
        p = generator.random(m) ** 3
        expected = np.empty(m)
        for i in range(m):  # a hypothesis is kept as soon as one with a smaller p is
            below = [j for j in range(m) if p[j] <= p[i]]
            expected[i] = min(1.0, max(p[j] * sum(p[k] >= p[j] for k in range(m)) for j in below))
        assert holm(p) == pytest.approx(expected)
        assert (holm(p) >= p).all()
        assert (holm(p) <= np.minimum(1.0, m * p) + 1e-12).all()


def test_several_models_are_corrected_task_by_task():
    first, second = _two()
    _, third = _two(seed=5)
    third["acc"] = np.where(np.arange(len(third)) % 9 == 0, 1 - first["acc"], first["acc"])
    table = compare_several(first, {"a": second, "b": third, "same": first})
    for _, part in table.groupby("task"):
        assert part["p_holm"].to_numpy() == pytest.approx(holm(part["p"].to_numpy()))
    assert list(table["model"].unique()) == ["a", "b", "same"]
    alone = compare_documents(first, second)
    assert table[table.model == "a"]["difference"].tolist() == alone["difference"].tolist()
    with pytest.raises(InputError, match="at least one other"):
        compare_several(first, {})


def test_other_documents_are_refused_by_name():
    first, second = _two()
    with pytest.raises(InputError, match="hard: document 119 is missing from the second"):
        compare_documents(first, second.iloc[:-1])
    with pytest.raises(InputError, match="easy: document 0 is missing from the first"):
        compare_documents(first.iloc[1:], second)
    other = second.copy()
    other.loc[3, "doc_hash"] = "another"
    with pytest.raises(InputError, match="easy: document 3 is another text"):
        compare_documents(first, other)
    with pytest.raises(InputError, match="easy: document 0 is there twice in the second"):
        compare_documents(first, pd.concat([second, second.iloc[:1]]))
    gap = second.copy()
    gap.loc[5, "acc"] = np.nan
    with pytest.raises(InputError, match="easy: document 5 has no acc"):
        compare_documents(first, gap)
    with pytest.raises(InputError, match="no column 'doc_hash'"):
        compare_documents(first.drop(columns="doc_hash"), second)
    with pytest.raises(InputError, match="no task here has acc_norm"):
        compare_documents(first, second, metric="acc_norm")
    with pytest.raises(InputError, match="in the groups a and b"):
        compare_documents(first, second, groups={"a": ["easy"], "b": ["easy"]})
    with pytest.raises(InputError, match="holds no documents"):
        compare_results({"tasks": {}}, {"tasks": {}})


def test_a_single_document_shows_no_spread():
    row = compare_documents(_frame(t=[1]), _frame(t=[0])).iloc[0]
    assert np.isnan(row["low"])
    assert row["difference"] == -1.0


@pytest.mark.parametrize("groups", [None, {"both": ["easy", "hard"]}])
def test_the_mean_difference_is_the_last_row_of_the_table(groups):
    first, second = _two()
    last = compare_documents(first, second, groups=groups, seed=3).iloc[-1]
    value, draws, count = mean_difference(first, second, groups=groups, seed=3)
    assert (value, count) == (pytest.approx(last["difference"]), last["n"])
    assert np.quantile(draws, [0.025, 0.975]).tolist() == pytest.approx([last["low"], last["high"]])
    assert mean_difference(first, first)[0] == 0.0
