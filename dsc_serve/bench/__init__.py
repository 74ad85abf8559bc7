"""Measurements: a running server under load, and the parts by themselves."""
