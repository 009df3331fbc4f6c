"""Tests that need more than the project installs are skipped where it is missing, but never in CI, where all must run."""

from __future__ import annotations

import os
import shutil

import pytest

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def needs(holds: bool, what: str) -> pytest.MarkDecorator:
    """Skip without `what`; in CI the test runs all the same, and fails."""
    return pytest.mark.skipif(not holds and not IN_CI, reason=f"needs {what}")


def needs_program(name: str) -> pytest.MarkDecorator:
    """Skip where that command isn't installed."""
    return needs(shutil.which(name) is not None, f"the command {name}")
