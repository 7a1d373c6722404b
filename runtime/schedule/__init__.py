"""Which work is done next and what it will take: costs, forecasts, the scheduler and its rival; no torch, no clock."""
