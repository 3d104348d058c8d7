"""Serving: live cameras over HTTP, archives of recordings, and vision towers inside vLLM."""
