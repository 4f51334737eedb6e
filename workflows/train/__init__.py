"""Training: what a stage trains (stage), the worker's loop (loop), Ray Train around it (trainer)."""
