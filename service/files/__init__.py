"""Uploaded training data, in the shape of the OpenAI files API."""
