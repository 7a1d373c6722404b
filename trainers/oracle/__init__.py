"""The oracle: each recipe's mathematics against closed form. `python -m fewstep.trainers.oracle` runs it."""
