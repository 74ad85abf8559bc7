"""The load generator: arrivals, prompts, connections, and what the clients saw. No torch."""
