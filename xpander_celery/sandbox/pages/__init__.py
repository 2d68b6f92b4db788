"""The history for people: server-rendered pages that refresh themselves. No script or style comes from elsewhere."""
