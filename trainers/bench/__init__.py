"""The trainers' commands and benchmarks."""
