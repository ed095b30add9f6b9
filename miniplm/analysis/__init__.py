"""What is told about results: the model card."""
