"""The devices of a machine, and what they cost."""
