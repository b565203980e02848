"""What can be asked of a training run: specs, their checks, and the job as the worker gets it."""
