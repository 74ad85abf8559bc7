"""Whole systems beside each other: comparisons, their rounds, their results and the report. No torch."""
