"""Tests and benchmarks share their models and tools: ``tests/support/model_fixtures.py``."""

pytest_plugins = ["model_fixtures"]
