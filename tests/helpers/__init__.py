"""What several tests use: small models, files that are damaged on purpose, a browser."""
