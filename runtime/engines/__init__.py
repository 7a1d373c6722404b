"""Whatever runs the networks: one module for each kind, their manifests, and which of them to take."""
