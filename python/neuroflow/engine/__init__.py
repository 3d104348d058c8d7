"""What happens in a pass through a patched tower. Every file is one trade; `patch.py` is the door."""
