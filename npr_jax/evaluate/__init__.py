"""Evaluation: an answer judged (judge), kept as a file (traces), and summed up (statistics)."""
