"""The demo: real jobs on a real worker, and their task history, from nothing. Layer 5."""
