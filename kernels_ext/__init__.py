"""One op a folder: reference.py in plain PyTorch, and what runs faster beside it."""
