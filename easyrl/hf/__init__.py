"""Hugging Face folders in and out, without torch."""
