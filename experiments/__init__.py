"""Studies: trainings by seeds, pruned, measured and drawn; results/ is made by them."""
