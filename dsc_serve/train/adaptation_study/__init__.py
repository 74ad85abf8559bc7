"""The study of adapters: every kind on the same texts at equal tokens and at equal bytes, in parts that resume."""
