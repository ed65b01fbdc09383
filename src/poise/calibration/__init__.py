"""Texts that models are measured on."""
