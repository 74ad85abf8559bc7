"""Operators of DSC layers and their baselines: knows nothing of serving."""
