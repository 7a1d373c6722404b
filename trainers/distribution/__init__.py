"""Distribution matching: a student learns from its own samples, by terms that say where they should move."""
