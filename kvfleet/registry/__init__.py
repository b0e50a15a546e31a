"""The fleet's models and their replicas."""
