"""What a step costs on thousands of ranks: a model, and the measurements it stands on."""
