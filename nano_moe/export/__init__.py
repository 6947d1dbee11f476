"""Runs as Hugging Face folders and GGUF files, and Hugging Face folders as runs."""
