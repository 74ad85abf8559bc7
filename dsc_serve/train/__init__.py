"""Making models: corpus, losses, optimiser, trainer, evaluation, pruning and the study of FFN kinds."""
