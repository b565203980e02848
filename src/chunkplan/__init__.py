"""chunkplan: plans, runs and profiles full-parameter fine-tuning that fits the GPU you have.

Its packages are the folders engine/, planner/, service/ and migrations/ of the repository, linked here.
"""
