"""Hostile inputs and faults, by group: every module of this package has its CASES.

`python -m tests.faults` counts those that held; `tests/test_hostile.py` runs each.
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.hostile.case import Case


def all_cases() -> list[Case]:
    """The cases of all modules.

    Raises:
        ValueError: two have the same group and name.
    """
    cases: list[Case] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        cases += getattr(importlib.import_module(f"{__name__}.{module.name}"), "CASES", [])
    names = [(case.group, case.name) for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"hostile: cases must have names of their own; got {sorted(twice)[:3]} twice")
    return cases
