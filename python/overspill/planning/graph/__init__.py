"""llama.cpp's graph of one step, in outline."""
