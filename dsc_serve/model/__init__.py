"""Configuration, decoder, the FFN kinds and checkpoints of DSC language models."""
