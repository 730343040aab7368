"""Between the registry and the server: fetching models, and saying which version is served."""
