"""Several models, the same questions."""
