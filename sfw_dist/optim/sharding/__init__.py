"""Who owns what, and how the ranks share a step."""
