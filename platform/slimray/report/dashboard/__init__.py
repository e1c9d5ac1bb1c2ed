"""Live page about all runs in a storage folder."""
