"""The only code that knows MLflow: publish, gate, promote, serve."""
