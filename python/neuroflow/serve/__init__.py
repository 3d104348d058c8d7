"""Past one process: a service for live cameras, recordings by the thousand, and towers inside vLLM."""
