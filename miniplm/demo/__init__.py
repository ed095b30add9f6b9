"""The whole story on one machine, offline: its text, its pipeline, and what came out."""
