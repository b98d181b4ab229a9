"""What each process of the stack is told, and what it is not."""

from __future__ import annotations

import json
import stat
from dataclasses import asdict
from pathlib import Path

import pytest

from gateway.stack.components import server_components, service_components
from gateway.stack.state import PORTS, SERVICES, StackState, load_credentials
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.errors import BadConfig

USER = {
    "PATH": "/bin", "HOME": "/home/user", "AWS_SECRET_ACCESS_KEY": "aws", "HF_TOKEN": "hub", "HTTPS_PROXY": "proxy",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector", "OTEL_EXPORTER_OTLP_HEADERS": "key=otel-secret",
    "OTEL_SERVICE_NAME": "mine", "SMELT_INFERENCE_SLOTS": "4", "SMELT_RPC_TOKEN": "token",
    "SMELT_PLATFORM_S3_BUCKET": "elsewhere", "LD_PRELOAD": "evil.so", "PYTHONPATH": "elsewhere",
    "SMELT_EVALUATOR_DATA_DIR": "data",
}  # fmt: skip


@pytest.fixture
def environments(tmp_path: Path) -> dict[str, dict[str, str]]:
    """The environment of every service, started by a user with secrets of all kinds."""
    state, credentials = StackState.create(), load_credentials(tmp_path)
    components = service_components(tmp_path, state, credentials, USER)
    return {component.name: dict(component.environment) for component in components}


def test_sandbox_gets_no_secret(environments: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """What runs foreign code holds nothing worth stealing: no credentials, no addresses of others."""
    sandbox = environments["sandbox"]
    assert not [key for key in sandbox if key.startswith(("SMELT_PLATFORM_", "HF_", "AWS_")) or "ADDRESS" in key]
    secrets = [credentials.secret for credentials in load_credentials(tmp_path).values()]
    for secret in (*secrets, "hub", "aws", "otel-secret"):
        assert not [key for key, value in sandbox.items() if secret in value]


@pytest.mark.parametrize("name", ["importer", "trainer", "inference", "evaluator", "gateway"])
def test_platform_settings_reach_whoever_uses_the_platform(
    environments: dict[str, dict[str, str]], name: str, tmp_path: Path
) -> None:
    """They are the stack's own, whatever the user has set for another platform; at the store each is itself."""
    config = from_environment(PlatformConfig, "SMELT_PLATFORM_", environments[name])
    assert config.s3_bucket == "smelt"
    assert (config.s3_access_key, config.s3_secret_key) == (name, load_credentials(tmp_path)[f"s3-{name}"].secret)


def test_hub_settings_reach_the_importer_alone(environments: dict[str, dict[str, str]]) -> None:
    """A hub token is a secret of one service."""
    assert [name for name, environment in environments.items() if "HF_TOKEN" in environment] == ["importer"]


def test_setting_of_one_service_reaches_that_service_alone(environments: dict[str, dict[str, str]]) -> None:
    """An unread variable would be refused by the others."""
    assert [name for name, environment in environments.items() if "SMELT_INFERENCE_SLOTS" in environment] == [
        "inference"
    ]


def test_relative_path_is_the_one_the_user_meant(environments: dict[str, dict[str, str]]) -> None:
    """The processes work in folders of their own."""
    assert environments["evaluator"]["SMELT_EVALUATOR_DATA_DIR"] == str(Path("data").absolute())


def test_nothing_else_of_the_user_is_passed_on(environments: dict[str, dict[str, str]]) -> None:
    """Neither secrets of other tools nor ways to load other code."""
    for environment in environments.values():
        assert not {"AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "PYTHONPATH", "OTEL_SERVICE_NAME"} & set(environment)
        assert environment["HOME"] != USER["HOME"]


def test_servers_get_their_configuration_in_files_that_only_the_owner_reads(tmp_path: Path) -> None:
    """Secrets are on no command line, where every user of the machine could read them."""
    state, credentials = StackState.create(), load_credentials(tmp_path)
    components = server_components(tmp_path, state, credentials)
    words = [word for component in components for word in (*component.command, *component.environment.values())]
    for one in credentials.values():
        assert not [word for word in words if one.secret in word]
    for path in (tmp_path / "credentials.json", tmp_path / "nats" / "nats.conf", tmp_path / "s3" / "identities.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_state_comes_back_with_its_ports(tmp_path: Path) -> None:
    """Addresses outlive a restart."""
    state = StackState.create()
    state.save(tmp_path)
    assert StackState.load(tmp_path) == state
    assert len(set(state.ports.values())) == len(PORTS)
    assert set(SERVICES) < set(PORTS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ports": {}, "processes": {}}', "\x00"])
def test_unreadable_state_is_named(tmp_path: Path, text: str) -> None:
    """Never silently replaced: it may be all that knows of running processes."""
    (tmp_path / "stack.json").write_text(text)
    with pytest.raises(BadConfig, match="stack.json cannot be read"):
        StackState.load(tmp_path)
    (tmp_path / "credentials.json").write_text(text)
    with pytest.raises(BadConfig, match="credentials.json cannot be read"):
        load_credentials(tmp_path)


def test_services_that_are_new_to_the_store_get_keys_and_the_others_keep_theirs(tmp_path: Path) -> None:
    """A folder of an earlier release goes on."""
    first = load_credentials(tmp_path)
    (tmp_path / "credentials.json").write_text(json.dumps({name: asdict(first[name]) for name in ("nats", "s3")}))
    again = load_credentials(tmp_path)
    assert set(again) == set(first) and all(again[name] == first[name] for name in ("nats", "s3"))
    assert load_credentials(tmp_path) == again


def test_folder_never_started_has_no_state(tmp_path: Path) -> None:
    """None, not an error."""
    assert StackState.load(tmp_path) is None
