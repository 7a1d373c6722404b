"""A request becomes rows, and rows pictures: plans, steps, edits, texts, picture files."""
