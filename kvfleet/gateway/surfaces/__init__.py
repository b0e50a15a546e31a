"""Other APIs that clients may speak to the gateway: Anthropic's Messages and OpenAI's Responses.

Each is a `kvfleet.gateway.surfaces.surface.Surface`: it reads a body into a chat, and renders a chat's answer. Between
the two a request is a chat like any other, for policy, budgets, caches, routing and trace.
"""
