"""OpenAI's fine-tuning API: another view of the same jobs, for clients that speak it."""
