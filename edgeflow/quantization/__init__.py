"""One set of integers: schemes, recipes, and their application to a checkpoint."""
