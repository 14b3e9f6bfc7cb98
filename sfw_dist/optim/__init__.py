"""The optimizer SFW, its step on one rank and on many, and its baselines."""
