"""Inputs by chance for whatever takes a file or a text: ``PYTHONPATH=tests:tests/support python -m fuzz --help``."""
