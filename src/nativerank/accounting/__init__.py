"""What a model and its training cost, derived from what layers declare."""
