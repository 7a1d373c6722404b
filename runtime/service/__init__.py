"""The runtime as it serves: models that come and go, the engine thread, tickets, metrics."""
