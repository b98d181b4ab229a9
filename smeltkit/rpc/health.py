"""`python -m smeltkit.rpc.health HOST:PORT` ends with 0 if the process there is serving: a probe without a shell."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from smeltkit import limits


def is_serving(address: str) -> bool:
    """Whether the health service at `address` says so within STACK_CHECK_TIMEOUT_S."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            reply = check(health_pb2.HealthCheckRequest(), timeout=limits.STACK_CHECK_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if is_serving(sys.argv[1]) else 1)
