"""Language models: from Hugging Face and GGUF files to one interface."""
