"""The contract between the pipeline and its components, and their discovery."""
