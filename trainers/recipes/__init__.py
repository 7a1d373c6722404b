"""Every method as a function that returns its whole run."""
