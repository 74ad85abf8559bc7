"""Tests of the tokenizer, chat templates, detokenising and stop strings."""
