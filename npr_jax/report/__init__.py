"""Pictures of what a model does: trees, masks, and a page with all answers of a file."""
