"""Pictures: the built-in data set, training data as latents, and how good pictures are."""
