"""Studies: trainings with several seeds, pruned, measured and drawn. They make results/."""
