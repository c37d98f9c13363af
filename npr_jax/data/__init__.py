"""Problems: where they come from, how they are prepared, and what a model is asked."""
