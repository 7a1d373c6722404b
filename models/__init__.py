"""Networks and the mathematics of one evaluation: paths, predictions, denoisers, bundles. Knows no other room."""
