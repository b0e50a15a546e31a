"""A declarative, plugin-based router and OpenAI-compatible gateway for fleets of LLM engines."""
