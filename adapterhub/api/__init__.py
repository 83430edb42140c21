"""The HTTP side: OpenAI's routes, adapters, administration, keys, streams and errors."""
