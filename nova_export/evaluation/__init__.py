"""ShapesEval: how well a bundle draws and moves what its prompts ask for. Numpy alone."""
