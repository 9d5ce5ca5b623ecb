"""A small model that answers, and a large one that helps it out."""
