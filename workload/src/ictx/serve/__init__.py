"""Between the registry and the server: fetching models, and setting which version is served."""
