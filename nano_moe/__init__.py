"""nano_moe: train dense and mixture-of-experts language models from one recipe and compare them."""

__version__ = "0.1.0"
