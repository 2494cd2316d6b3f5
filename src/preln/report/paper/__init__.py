"""The write-up: every number, table and figure of it from committed results, and the checks that see to it.

    python -m preln.report.paper generate paper         # macros, tables and figures, under paper/generated
    python -m preln.report.paper check paper/main.tex   # no number by hand, every claim borne by the ledger
    python -m preln.report.paper log paper/main.log     # no undefined reference, nothing that sticks out

Exit codes: 0 done; 1 the text or the log has problems, a line each; 2 something is missing, one line.
"""

from __future__ import annotations

from preln.report.paper.build import generate, main, older_statements
from preln.report.paper.check import Index, check_log, check_source, read_index

__all__ = ["Index", "check_log", "check_source", "generate", "main", "older_statements", "read_index"]
