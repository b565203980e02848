"""The model and GPU catalogs over HTTP."""
