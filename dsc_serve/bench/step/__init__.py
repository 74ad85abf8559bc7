"""The engine from inside: the parts of a step, the scheduler, policies and grouping, whole forwards."""
