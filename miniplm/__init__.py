"""MiniPLM: distil a large language model into a small one before pre-training (arXiv 2410.17215)."""

__version__ = "0.1.0"
