"""From a teacher and a recipe to a sealed bundle: distillation, control, fine-tuning, the built-in teacher."""
