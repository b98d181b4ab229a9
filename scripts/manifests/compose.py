"""The compose file: its form by a strict schema, its settings and its walls by the rules that the cluster has too."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from scripts.manifests.settings import environment_errors
from smeltkit import limits
from smeltkit.config import environment

_FLUSH_S = limits.BUS_CLOSE_TIMEOUT_S + limits.TELEMETRY_FLUSH_S


def compose_errors(path: Path) -> Iterator[str]:
    """What is wrong with a compose file; the schema lies beside it."""
    return errors_of(yaml.safe_load(path.read_text()), path.parent)


def docker_compose() -> list[str] | None:
    """The command of Docker's own reader of compose files, version 2 or later; None where it is not installed."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            told = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False).stdout
            if (major := re.match(r"v?(\d+)\.", told)) and int(major[1]) >= 2:
                return command
    return None


def docker_errors(command: Sequence[str], path: Path) -> list[str]:
    """What it says is wrong with a compose file; it is given a word for every secret, and needs no engine."""
    secrets = {name: "word" for name in re.findall(r"\$\{(\w+)", path.read_text())}
    asked = [*command, "--file", str(path), "config", "--quiet"]
    done = subprocess.run(asked, env=environment(secrets), capture_output=True, text=True, check=False)
    return done.stderr.splitlines() or [f"{command[0]} ended with {done.returncode}"] if done.returncode else []


def errors_of(declared: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """What is wrong with a compose file that was read from `folder`."""
    validator = Draft202012Validator(yaml.safe_load((folder / "schema.yaml").read_text()))
    for error in validator.iter_errors(declared):
        yield f"{'.'.join(map(str, error.absolute_path)) or 'the file'}: {error.message[:300]}"
    for name, service in declared["services"].items():
        yield from (f"{name}: {line}" for line in _service_errors(name, service, declared, folder))


def _service_errors(name: str, service: Mapping[str, Any], declared: Mapping[str, Any], folder: Path) -> Iterator[str]:
    environment = {key: str(value) for key, value in service.get("environment", {}).items()}
    yield from environment_errors(" ".join(map(str, service.get("command", ()))), environment)
    yield from _reference_errors(service, declared, folder)
    tag = service["image"].rpartition(":")[2]
    if tag == "latest" or "/" in tag or tag == service["image"]:
        yield f"image {service['image']} needs a tag other than latest"
    for port in service.get("ports", ()):
        if not port.startswith("127.0.0.1:"):
            yield f"port {port} is open to the network; bind 127.0.0.1"
    if "SMELT_RPC_LISTEN" in environment:
        needed_s = 3 * float(environment.get("SMELT_RPC_DRAIN_GRACE_S", limits.DRAIN_GRACE_S)) + _FLUSH_S
        if float(service.get("stop_grace_period", "10s").removesuffix("s")) < needed_s:
            yield f"stop_grace_period must be {needed_s:g}s or more: a drain may last so long"
    for key, value in environment.items():
        host = value.rpartition(":")[0]
        if key.endswith("_ADDRESS") and not _shares_network(declared, name, host):
            yield f"{key}={value}: {host} is on no network of {name}"
    owner = "smelt" if "smeltkit.blobs" in service.get("command", ()) else name
    if (key := environment.get("SMELT_PLATFORM_S3_ACCESS_KEY", owner)) != owner:
        yield f"meets the object store as {key}; its key is {owner}"
    if name == "sandbox":
        yield from _sandbox_errors(service["networks"], declared)


def _reference_errors(service: Mapping[str, Any], declared: Mapping[str, Any], folder: Path) -> Iterator[str]:
    for other in service.get("depends_on", {}):
        if other not in declared["services"]:
            yield f"depends on {other}, which is not here"
    for network in service["networks"]:
        if network not in declared["networks"]:
            yield f"network {network} is not declared"
    for mount in service.get("volumes", ()):
        source = mount.split(":")[0]
        if source.startswith(".") and not (folder / source).is_file():
            yield f"mounts {source}, which does not exist"
        elif not source.startswith(".") and source not in declared["volumes"]:
            yield f"volume {source} is not declared"


def _sandbox_errors(networks: Sequence[str], declared: Mapping[str, Any]) -> Iterator[str]:
    if not all(declared["networks"][network].get("internal") for network in networks):
        yield "must be on internal networks only"
    near = {name for name, service in declared["services"].items() if set(service["networks"]) & set(networks)}
    if near - {"sandbox", "evaluator", "gateway"}:
        yield f"must be near its callers only, not {', '.join(sorted(near - {'sandbox', 'evaluator', 'gateway'}))}"


def _shares_network(declared: Mapping[str, Any], name: str, host: str) -> bool:
    other = declared["services"].get(host, {"networks": []})
    return bool(set(other["networks"]) & set(declared["services"][name]["networks"]))
