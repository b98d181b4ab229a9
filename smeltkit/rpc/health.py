"""`python -m smeltkit.rpc.health HOST:PORT` ends with 0 if the process there is serving: a probe without a shell.

With SMELT_RPC_TLS_DIR it speaks TLS under the name of the process beside which it runs: the kubelet's own probe cannot.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from smeltkit import limits
from smeltkit.config import from_environment
from smeltkit.errors import BadCertificate
from smeltkit.rpc.server import RpcConfig
from smeltkit.rpc.tls import Identity


def is_serving(address: str, identity: Identity | None = None) -> bool:
    """Whether the health service at `address` says so within STACK_CHECK_TIMEOUT_S."""
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if identity is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        options.append(("grpc.ssl_target_name_override", identity.names[0]))
        channel = grpc.secure_channel(address, identity.channel_credentials(), options=options)
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            reply = check(health_pb2.HealthCheckRequest(), timeout=limits.STACK_CHECK_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def main(address: str) -> int:
    """The exit code: 0 if the process at `address` is serving."""
    try:
        identity = from_environment(RpcConfig, "SMELT_RPC_").identity()
    except BadCertificate as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0 if is_serving(address, identity) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
