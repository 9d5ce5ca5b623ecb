"""What the header of a GGUF file says."""
