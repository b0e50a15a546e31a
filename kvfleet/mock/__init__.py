"""Mock engines as processes: a simulated engine behind OpenAI's API, with vLLM's metrics, KV events and faults."""
