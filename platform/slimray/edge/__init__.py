"""What a network costs: counted, measured on this device, or modelled."""

COUNTED = ("params", "macs", "memory_mb")  # costs that need no device
MEASURED = ("latency_ms", "energy_mj")  # costs of a device
