"""Numbers for people: tables, charts, one HTML page per run."""
