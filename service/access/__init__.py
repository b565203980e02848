"""Who asks: API keys and their scopes, projects, and how much of the service each may take."""
