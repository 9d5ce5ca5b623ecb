"""A server with OpenAI's API: requests become streams of the engine, which decodes them together."""
