"""Which experts of a mixture tokens use, and what a cache of experts would make of that."""
