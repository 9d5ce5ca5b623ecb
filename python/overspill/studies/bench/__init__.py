"""Speed of a model on a machine."""
