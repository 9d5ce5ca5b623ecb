"""Tests and benchmarks share their models and tools: ``tests/support``."""

pytest_plugins = ["interrupts", "model_fixtures"]
