"""What methods are put together from: times, paths between times, steps, rollouts, distances."""
