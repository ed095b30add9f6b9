"""Text, tokens, corpora, scores: what is read, made and kept."""
