"""Costs of networks: counted, measured on this device, or modelled."""

COUNTED = ("params", "macs", "memory_mb")  # costs that need no device
COUNTED_INT8 = ("peak_kb", "int8_kb")  # costs on a microcontroller, counted on request
MEASURED = ("latency_ms", "energy_mj")  # costs on a device
