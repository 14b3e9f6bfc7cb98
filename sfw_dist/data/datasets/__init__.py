"""The data sets known by name, and how their files are read."""
