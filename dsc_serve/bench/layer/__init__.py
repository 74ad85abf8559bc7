"""One feed-forward layer by itself: kinds and kernels against an oracle and the machine's roofline."""
