"""Images: reading, layouts, generated sets."""
