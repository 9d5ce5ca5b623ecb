"""The device of each part of a model."""
