"""Several tokens a step, compared: systems with the same drafts, widths against step time, and real work."""
