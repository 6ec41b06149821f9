"""secateurs prunes reasoning language models on their own chain of thought."""
