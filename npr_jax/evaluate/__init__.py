"""Evaluation: benchmarks (where problems come from), metrics (pure functions), run (decoding)."""
