"""The process boundary: typed messages, the engine process, its supervisor and the async client."""
