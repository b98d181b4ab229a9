"""What the stack remembers between commands: `stack.json` (ports, processes) and `credentials.json` (mode 0600).

Ports and credentials are chosen once, so addresses outlive a restart. Delete both files to choose anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gateway.stack.process import ProcessRecord
from smeltkit.blobs import access
from smeltkit.errors import BadConfig
from smeltkit.servers import LOOPBACK, S3_PARTS, Credentials, free_ports, write_private

SERVERS = ("nats", "s3")
SERVICES = ("importer", "trainer", "inference", "evaluator", "sandbox")
S3_USERS = access.SERVICES
_USERS = {**dict.fromkeys(SERVERS, "smelt"), **{f"s3-{user}": user for user in S3_USERS}}
"""User names by what the file calls them."""
PORTS = ("nats", *S3_PARTS, *SERVICES, "gateway", "gateway_http")


@dataclass(kw_only=True)
class StackState:
    """Ports by name, and the processes that were started and not stopped since."""

    ports: dict[str, int]
    processes: dict[str, ProcessRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, home: Path) -> StackState | None:
        """The state below `home`, None if there is none; BadConfig if it cannot be read."""
        path = home / "stack.json"
        try:
            value: dict[str, Any] = json.loads(path.read_bytes())
            ports = {name: int(value["ports"][name]) for name in PORTS}
            processes = {
                name: ProcessRecord(**{**entry, "command": tuple(entry["command"])})
                for name, entry in value["processes"].items()
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadConfig(
                f"{path} cannot be read ({error!r}); stop what it started, delete it and try again"
            ) from error
        return cls(ports=ports, processes=processes)

    @classmethod
    def create(cls) -> StackState:
        """A state with free ports and no process."""
        return cls(ports=dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))

    def address(self, name: str) -> str:
        """host:port of a component."""
        return f"{LOOPBACK}:{self.ports[name]}"

    def save(self, home: Path) -> None:
        """Replaces `stack.json`. `services`, `gateway_grpc` and `gateway_http` are there for readers outside."""
        services = {
            name: {"pid": record.pid, "address": self.address(name)}
            for name, record in self.processes.items()
            if name in SERVICES
        }
        value = {
            "gateway_grpc": self.address("gateway"),
            "gateway_http": f"http://{self.address('gateway_http')}",
            "services": services,
            "ports": self.ports,
            "processes": {name: asdict(record) for name, record in self.processes.items()},
        }
        write_private(home / "stack.json", json.dumps(value, indent=2) + "\n")


def load_credentials(home: Path) -> dict[str, Credentials]:
    """Credentials of `nats`, of `s3` and of each service at it, made when they are missing, for their owner only."""
    path = home / "credentials.json"
    try:
        known = {}
        if path.exists():
            known = {name: Credentials(**entry) for name, entry in json.loads(path.read_bytes()).items()}
            known |= {name: known[name] for name in SERVERS}
        made = {name: known.get(name) or Credentials.generate(user) for name, user in _USERS.items()}
        if made != known:
            write_private(path, json.dumps({name: asdict(credentials) for name, credentials in made.items()}, indent=2))
        return made
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfig(f"{path} cannot be read ({error!r}); stop the stack, delete it and try again") from error
