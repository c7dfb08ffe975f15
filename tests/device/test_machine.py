"""Test what the machine tells of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.device import machine

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_the_commit_of_a_checkout_is_known():
    """It stands beside every number that is measured."""
    assert machine.environment()["commit"]
