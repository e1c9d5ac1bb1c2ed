"""Golden values: what the code computed at commit d4a6aae, recorded once and compared ever since."""
