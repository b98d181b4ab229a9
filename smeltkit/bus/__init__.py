"""NATS, owned once: connection, subjects, envelopes, buckets, the work queue, dead letters and leases.

Nothing outside this package calls the NATS client. What the rest sees is `Bus` (publish, buckets, queues), and every
failure of NATS reaches it as `BusUnavailable`.
"""

from smeltkit.bus.client import Bus

__all__ = ["Bus"]
