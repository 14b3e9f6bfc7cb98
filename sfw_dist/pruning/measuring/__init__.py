"""Measuring a model at many sparsities: `sweep`, its curve, and what they are made of."""
