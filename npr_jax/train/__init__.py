"""Training: advantages, losses, the train step, and the three stages Zero, Beta and PAPO."""
