"""Adapters on a basis that they share: its matrices lie once beside their folders, and in each folder its cores."""
