"""Other forms of a bundle, each proven equal to torch before it is used."""
