"""The package itself: what importing it costs and what it offers."""

import subprocess
import sys

import pytest

import preln


def run(code):
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_import_brings_in_no_heavy_package():
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy', 'pandas', 'sympy', 'z3', 'scipy'}"
    assert run(f"import sys, preln; print({heavy} & set(sys.modules))").strip() == "set()"


def test_the_command_line_is_light_until_a_verb_runs():
    code = (
        "import sys, preln.cli, preln.options; preln.options.build_parser('0'); "
        "print({'torch', 'transformers', 'pandas', 'numpy', 'sympy'} & set(sys.modules))"
    )
    assert run(code).strip() == "set()"


@pytest.mark.parametrize("verb", ["probe", "prune", "heal", "evaluate"])
def test_a_room_can_be_called_whatever_was_imported_first(verb):
    assert run(
        f"import preln; a = callable(preln.{verb}); import preln.{verb}; print(a, callable(preln.{verb}))"
    ) == ("True True\n")
    assert run(f"import preln.{verb}; import preln; print(callable(preln.{verb}))") == "True\n"


def test_every_public_name_exists():
    for name in preln.__all__:
        assert getattr(preln, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        preln.nothing  # noqa: B018
