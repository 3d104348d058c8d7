"""What a run came to: its numbers, what to try next, and the page that shows both."""
