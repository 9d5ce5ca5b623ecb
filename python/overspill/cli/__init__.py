"""The command ``overspill``."""
