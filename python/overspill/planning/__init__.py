"""Which placement is the fastest, and how fast it will be."""
