"""The demo checkpoint: a small NOVA that draws and moves shapes, and how it was trained."""
