"""A loaded model: streams of tokens, conversations and tools."""
