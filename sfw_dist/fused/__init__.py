"""The step of all tensors of a rank together, in few passes over memory: the same answers as ``step``, to the bit."""
