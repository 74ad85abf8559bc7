"""Several processes that share one model: the first, which has the engine, leads, and the others follow its steps."""
