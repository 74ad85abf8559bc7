"""Metrics for Prometheus: counted at the HTTP edge, and read from the engine at the moment of the scrape."""
