"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_fixtures import N_THREADS
from overspill import Model


@pytest.fixture
def model(smollm2_path: Path) -> Iterator[Model]:
    """Return SmolLM2, which has a chat template, with nothing in its context yet."""
    with Model(smollm2_path, n_ctx=1024, n_threads=N_THREADS, repack="off") as loaded:
        yield loaded
