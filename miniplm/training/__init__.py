"""Training: steps, loop, and what a run keeps on disk."""
