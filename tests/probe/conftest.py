"""Lets the tests import the slow definitions beside them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def definitions():
    """The module with every measure written out."""
    path = Path(__file__).with_name("definitions.py")
    spec = importlib.util.spec_from_file_location("probe_definitions", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
