"""Training: what a stage trains (stage), the worker's loop (loop), its checkpoints (checkpoint, saver, restore), and
Ray Train around it (trainer)."""
