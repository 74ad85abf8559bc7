"""Structured outputs: grammars are compiled and followed by processes that can be killed. Free of torch."""
