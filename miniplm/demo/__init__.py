"""The whole story on one machine, offline: text and pipeline."""
