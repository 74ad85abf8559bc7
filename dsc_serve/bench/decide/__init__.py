"""What nobody measured: a model of step times, fitted to a machine's own, and what it expects of other sizes."""
