"""Tests and benchmarks share their models and tools: ``tests/support``."""

import gpu_visibility

gpu_visibility.enter_world()

pytest_plugins = ["browsers", "gpu_worlds", "gpu_memory", "interrupts", "model_fixtures"]
