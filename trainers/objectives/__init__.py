"""What else players minimise: consistency, trajectories, flow maps, straight lines, distillation of guidance."""
