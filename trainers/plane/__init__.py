"""The plane: two-dimensional data known in closed form, on which every recipe trains in a minute."""
