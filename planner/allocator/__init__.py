"""A simulator of CUDA's caching allocator, which knows nothing of training steps."""
