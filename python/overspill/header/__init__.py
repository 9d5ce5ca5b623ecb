"""The header of a model's file."""
