"""Models by their names: those on the disk, and those on the Hugging Face hub."""
