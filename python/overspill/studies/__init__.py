"""Measurements and comparisons of whole models."""
