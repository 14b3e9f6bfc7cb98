"""How runs start. Nothing in sfw_dist knows of this package."""
