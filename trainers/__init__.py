"""Recipes, their parts, the one loop that trains them, and what measures the result."""
