"""TensorRT engines of a bundle's stages: what they are built for, from what, and how. Torch-free."""
