"""What devices there are, and how fast they are."""
