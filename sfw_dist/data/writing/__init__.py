"""Writes the samples of a part, of pixels or of JPEGs, so that an interruption loses little."""
