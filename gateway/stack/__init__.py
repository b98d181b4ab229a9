"""The platform on one machine, by one command: `start`, `stop` and `status` of a folder."""

from gateway.stack.stack import ComponentStatus, StackStatus, start, status, stop

__all__ = ["ComponentStatus", "StackStatus", "start", "status", "stop"]
