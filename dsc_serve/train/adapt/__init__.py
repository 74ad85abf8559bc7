"""Training adapters: low-rank updates of a frozen base, one for each text, all in the same batches."""
