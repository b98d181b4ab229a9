"""What is done with the platform itself, its sandbox, its store and its settings."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from gateway import stack
from gateway.stack.components import platform_config
from gateway.stack.state import StackState, load_credentials
from smeltkit.bus import Bus
from smeltkit.config import PlatformConfig
from smeltkit.rpc.tls import Identity
from tests.e2e.conftest import Smelt
from tests.e2e.verb_cases import SMALL, case


def pids(smelt: Smelt) -> dict[str, int]:
    """Process ids by name, 0 for what does not run."""
    return {item.name: item.pid for item in stack.status(smelt.home).components}


@case("up")
def up(smelt: Smelt, *_: Any) -> None:
    before = pids(smelt)
    smelt.kill("trainer")
    assert smelt("up")["is_up"]
    after = pids(smelt)
    assert after["trainer"] not in (0, before.pop("trainer")) and before.items() <= after.items()


@case("down")
def down(smelt: Smelt, *_: Any) -> None:
    stopped = smelt("down")
    assert {item["health"] for item in stopped["components"]} == {"stopped"} and not any(pids(smelt).values())
    assert smelt("up")["is_up"]
    assert "ore-11m:latest" in [model["name"] for model in smelt("models")["models"]], "data must outlive it"


@case("status")
def status(smelt: Smelt, *_: Any) -> None:
    found = smelt("status")
    assert found["is_up"] and {item["name"]: item["pid"] for item in found["components"]} == pids(smelt)


@case("doctor")
def doctor(smelt: Smelt, *_: Any) -> None:
    smelt.kill("trainer")
    assert smelt("up")["is_up"]
    told = smelt.run("doctor", "--json")
    findings = {item["subject"]: item for item in json.loads(told.stdout)["findings"]}
    assert Path(findings["nats-server"]["detail"]).is_file()
    assert "trainer killed SIGKILL" in findings.pop("crashes within a day")["detail"] and told.returncode == 1
    assert all(item["is_ok"] for item in findings.values())


@case("logs")
def logs(smelt: Smelt, *_: Any) -> None:
    lines = smelt.run("logs", "gateway", "--lines", "200").stdout.splitlines()
    assert any(json.loads(line)["message"] == "serving HTTP" for line in lines)


@case("sandbox run")
def sandbox_run(smelt: Smelt, *_: Any) -> None:
    done = smelt("sandbox", "run", "-", stdin="print(6 * 7)")
    assert (done["verdict"], done["stdout"], done["exit_status"]) == ("passed", "42\n", 0)
    failed = smelt.run("sandbox", "run", "-", stdin="raise SystemExit(3)")
    assert failed.returncode == 1


@case("sandbox doctor")
def sandbox_doctor(smelt: Smelt, *_: Any) -> None:
    found = smelt("sandbox", "doctor")
    assert found["judge_digest"].startswith("sha256:") and any(layer["is_present"] for layer in found["layers"])


@case("sandbox bench")
def sandbox_bench(smelt: Smelt, *_: Any) -> None:
    found = smelt("sandbox", "bench", "--starts", "2", "--verdicts", "4")
    assert found["verdicts_per_second"] > 0 and found["slots"] >= 1


@case("gc")
def gc(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    """Of a store of today nothing may go; what goes from an older one is for tests that can set its clock."""
    files = {layer["digest"] for layer in smelt("inspect", SMALL)["artifact"]["layers"]}
    done = smelt("gc", "--apply")
    assert done["is_applied"] and done["objects"] == [] and done["kept"] > len(files)
    assert len(smelt("report", reports[0]["digest"], "--samples")["samples"]) == 4, "its records must still be there"


@case("admin backup")
def admin_backup(smelt: Smelt, reports: list[dict[str, Any]], folder: Path) -> None:
    """What is read back there is what the platform holds; restoring it is for tests that have two platforms."""
    done = smelt("admin", "backup", str(folder / "backup"))
    assert done["missing"] == [] and done["unfinished_jobs"] == 0 and done["entries"]["smelt_jobs"] >= 2
    assert set(smelt("inspect", SMALL)["artifact"]["digest"].split(":")[1:]) <= {
        "".join(path.parts[-2:]) for path in (folder / "backup" / "manifests").rglob("*") if path.is_file()
    }


@case("admin restore")
def admin_restore(smelt: Smelt, reports: list[dict[str, Any]], folder: Path) -> None:
    smelt("admin", "backup", str(folder / "backup"))
    refused = smelt.run("admin", "restore", str(folder / "backup"), "--json")
    assert refused.returncode == 4 and json.loads(refused.stdout)["error"]["reason"] == "NOT_EMPTY"


@case("admin certificates")
def admin_certificates(smelt: Smelt, reports: list[dict[str, Any]], folder: Path) -> None:
    """Each is whom its folder says; another run renews them under the same authority."""
    made = smelt("admin", "certificates", str(folder / "certificates"))["folders"]
    authority = (folder / "certificates" / "gateway" / "ca.crt").read_bytes()
    smelt("admin", "certificates", str(folder / "certificates"))
    assert set(made) >= {"gateway", "sandbox", "operator"}
    for name, place in made.items():
        Identity(place).check_name(name)
        assert (Path(place) / "ca.crt").read_bytes() == authority


@case("admin usage")
def admin_usage(smelt: Smelt, *_: Any) -> None:
    """Without keys there are no tenants; what there is with them is in tests/integration/test_tenant_quotas.py."""
    assert smelt("admin", "usage") == {"tenants": []}


@case("admin topology")
def admin_topology(smelt: Smelt, *_: Any) -> None:
    """What somebody changed by hand is shown, and mended when it is asked for."""
    state = StackState.load(smelt.home)
    assert state is not None
    asyncio.run(_shorten_events(platform_config(state, load_credentials(smelt.home))))
    (line,) = smelt("admin", "topology")["differences"]
    assert line.startswith("SMELT_EVENTS: max_age 86400")
    assert smelt("admin", "topology", "--apply") == {"differences": [line], "is_applied": True}
    assert smelt("admin", "topology")["differences"] == []


async def _shorten_events(platform: PlatformConfig) -> None:
    bus = await Bus.connect(platform, name="test")
    info = await bus.jetstream.stream_info("SMELT_EVENTS")
    await bus.jetstream.update_stream(info.config.evolve(max_age=86400.0))
    await bus.close()


@case("config explain")
def config_explain(smelt: Smelt, *_: Any) -> None:
    (home,) = smelt("config", "explain", "SMELT_HOME")["settings"]
    assert (home["value"], home["source"]) == (str(smelt.home), "environment")
