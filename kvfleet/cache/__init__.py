"""What is known of prompts and of caches."""
