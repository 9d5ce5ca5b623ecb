"""The devices of a machine: memory, speed and fixed costs."""
