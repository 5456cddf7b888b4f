"""Metrics through ``evaluate``: those in ``modules`` work without a network, others come from the hub by name."""
