"""Costs of networks: counted, measured on this device, or modelled."""

COUNTED = ("params", "macs", "memory_mb")  # costs that need no device
COUNTED_INT8 = ("peak_kb", "int8_kb")  # counted too, where they are asked for: what a microcontroller needs
MEASURED = ("latency_ms", "energy_mj")  # costs of a device
