"""Measurements: a model and a batch of tokens in, tidy tables out. The room can be called like its verb."""

from __future__ import annotations

from preln.base.rooms import callable_room
from preln.probe.measure import ProbeResult, probe, probe_tables
from preln.probe.measures import MEASURES
from preln.probe.norms import NormLaw, recognise
from preln.probe.store import write_probe
from preln.probe.summary import answers, describe

__all__ = [
    "MEASURES",
    "NormLaw",
    "ProbeResult",
    "answers",
    "describe",
    "probe",
    "probe_tables",
    "recognise",
    "write_probe",
]

callable_room(__name__)
