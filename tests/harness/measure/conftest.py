"""Fixtures of all tests of measurements."""

from contextlib import nullcontext

import pytest
from lamabench.harness.measure import models, operators


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Tests that share a GPU do not wait for each other, because their times do not matter."""
    for place in (models, operators):
        monkeypatch.setattr(place, "one_at_a_time", lambda device, say, ahead=False: nullcontext())
