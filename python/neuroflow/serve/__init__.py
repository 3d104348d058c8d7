"""Past one process: a service for live cameras, and recordings by the thousand."""
