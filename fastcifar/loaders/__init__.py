"""What feeds the training: four loaders that give the same batches, `loader.py` says how."""
