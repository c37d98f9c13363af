"""The life of a resumable run: its directory, checkpoints, metrics, and endings."""
