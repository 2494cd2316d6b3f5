"""Statements are set without a change of meaning, and nothing from data becomes markup."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preln.report.typeset import typeset


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("|dL/dx_{l+1}|^2 >= 0", "|dL/dx<sub>l+1</sub>|<sup>2</sup> ≥ 0"),
        ("sigma(B_RMS) <= sigma(B_LN)", "σ(B<sub>RMS</sub>) ≤ σ(B<sub>LN</sub>)"),
        ("prod_{k>l} (1 + a_k g_k)", "∏<sub>k&gt;l</sub> (1 + a<sub>k</sub> g<sub>k</sub>)"),
        ("sum_{k=l}^{L-1} a_k", "∑<sub>k=l</sub><sup>L-1</sup> a<sub>k</sub>"),
        ("|dL/dtheta_l|", "|dL/dθ<sub>l</sub>|"),
        ("the sum of all", "the sum of all"),
        ("(var + eps)^(3/2)", "(var + ε)<sup>(3/2)</sup>"),
        ("spearman_depth of first_order_damage", "spearman_depth of first_order_damage"),
        ("<script>", "&lt;script&gt;"),
        ("a_<b>", "a_&lt;b&gt;"),
        ("2^10 and x^2", "2<sup>10</sup> and x<sup>2</sup>"),
    ],
)
def test_known_statements(text: str, markup: str) -> None:
    assert str(typeset(text)) == markup


@given(st.text())
def test_only_indices_and_exponents_become_markup(text: str) -> None:
    markup = str(typeset(text))
    assert not re.sub(r"</?su[bp]>", "", markup).count("<")
    assert markup.count("<sub>") == markup.count("</sub>")
    assert markup.count("<sup>") == markup.count("</sup>")


@given(st.text(alphabet=st.characters(blacklist_characters="_^<>=!-&\"'", blacklist_categories=("Lu", "Ll"))))
def test_text_without_mathematics_stays(text: str) -> None:
    assert typeset(text).unescape() == text
