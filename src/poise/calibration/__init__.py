"""Texts that models read, and what is learned while they do."""
