"""The HTTP server: OpenAI-shaped requests in, JSON or server-sent events out. Free of torch."""
