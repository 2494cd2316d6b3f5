"""Statements of the ledger with their mathematics set: Greek letters, signs, indices and exponents.

They are written in plain characters, as `sigma(B) <= |gamma|_(1)/s`. This makes them readable without a
library and changes no meaning: what it does not know stays as it was written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIGNS = {
    **{"<=": "≤", ">=": "≥", "!=": "≠", "->": "→", "sqrt": "√", "infinity": "∞"},
    **{
        "alpha": "α",
        "beta": "β",
        "gamma": "γ",
        "delta": "δ",
        "eps": "ε",
        "theta": "θ",
        "dtheta": "dθ",
        "kappa": "κ",
    },
    **{"lambda": "λ", "mu": "μ", "rho": "ρ", "sigma": "σ", "tau": "τ", "pi": "π", "phi": "φ"},
    **{"Gamma": "Γ", "Delta": "Δ", "Sigma": "Σ"},
}
_OPERATORS = {"sum": "∑", "prod": "∏"}
"""Set only before an index: "the sum of" is a word."""

_TOKEN = re.compile(
    r"(?P<word>[A-Za-z]+)"
    r"|(?P<shift>[_^](?:\{[^{}]*\}|\([^()]*\)|-?[A-Za-z0-9]+))"
    r"|(?P<sign><=|>=|!=|->)"
    r"|(?P<other>.)",
    re.DOTALL,
)


def typeset(text: str) -> Any:
    """The statement as safe markup: everything from data is escaped, indices become `sub`, exponents `sup`.

    An underscore makes an index only after a sign, a bracket or a name of at most three letters, so that
    names such as `first_order_damage` keep theirs.

    >>> str(typeset("|gamma|_(1)/s^2 <= sum_k a_k"))
    '|γ|<sub>(1)</sub>/s<sup>2</sup> ≤ ∑<sub>k</sub> a<sub>k</sub>'
    >>> str(typeset("<b>first_order_damage</b>"))
    '&lt;b&gt;first_order_damage&lt;/b&gt;'
    """
    from markupsafe import Markup

    return Markup("").join(_pieces(text))


def _pieces(text: str) -> Iterator[Any]:
    from markupsafe import Markup

    before, shifts = "", False
    matches = list(_TOKEN.finditer(text))
    for place, match in enumerate(matches):
        piece = match.group()
        following = matches[place + 1] if place + 1 < len(matches) else None
        if match.lastgroup == "shift":
            if shifts or (piece[0] == "^" and before[-1:].isalnum()):
                inner = piece[2:-1] if piece[1] == "{" else piece[1:]
                tag = "sub" if piece[0] == "_" else "sup"
                yield Markup(f"<{tag}>") + Markup("").join(_pieces(inner)) + Markup(f"</{tag}>")
                continue  # a sign may carry an index and an exponent
            yield piece
        else:
            indexed = following is not None and following.lastgroup == "shift"
            yield _OPERATORS[piece] if indexed and piece in _OPERATORS else _SIGNS.get(piece, piece)
        before = piece
        known = piece in _SIGNS or piece in _OPERATORS
        shifts = known or piece in ")]|" or (match.lastgroup == "word" and len(piece) <= 3)
