"""Training: batches of context–query pairs, and remembering them."""
