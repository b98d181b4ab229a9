"""R-107: every verb of the command line is run from end to end on the shipped model, and what it brought about is seen.

The verbs come from the parser itself: one without a case here fails.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import grpc
import pytest
from smelt.artifact.v1 import artifact_pb2, artifact_pb2_grpc

from gateway import stack
from gateway.cli import main
from gateway.stack.components import platform_config
from gateway.stack.state import StackState, load_credentials
from smeltkit.bus import Bus
from smeltkit.config import PlatformConfig
from smeltkit.rpc.tls import Identity
from tests.e2e.conftest import BASIC, MODEL, Smelt

SMALL = "ore-11m:q8_0"
SUITE = ("--suite", "basic", "--data", str(BASIC))
CASES: dict[str, Callable[..., None]] = {}


def verbs() -> Iterator[str]:
    """Every command and sub-command that the parser knows, e.g. "jobs ls"."""
    for name in main._COMMANDS:
        below = getattr(main._load(name), "commands", {})
        yield from (f"{name} {verb}" for verb in below) if below else (name,)


def case(verb: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares what is done with a verb, and what must come of it."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        CASES[verb] = function
        return function

    return declare


@pytest.fixture(scope="module")
def reports(smelt: Smelt) -> list[dict[str, Any]]:
    """Two evaluations of four problems each."""
    return [smelt("eval", *SUITE, "--limit", "4", "--seed", str(seed), SMALL) for seed in (201, 202)]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a pre-training that takes it to some words, and of a sweep, of which it is the first run."""
    folder = tmp_path_factory.mktemp("training")
    rows = [{"text": f"The number after {number} is {number + 1}."} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"layers": 1, "hidden_size": 64, "intermediate_size": 128, "heads": 2, "kv_heads": 1}
    settings = {"method": "pretrain", "init": "random", "shape": shape, "epochs": 20, "sequence_tokens": 128,
                "packs_per_step": 2, "learning_rate": 1e-2}  # fmt: skip
    whole = {"base": "ore-11m", "data": "rows.jsonl", "heldout": "rows.jsonl", "name": "ore-11m:taught", **settings}
    file = folder / "training.yaml"
    file.write_text(json.dumps(whole))
    sweep = {"keys": {"learning_rate": [1e-2, 2e-2]}}
    (folder / "sweep.yaml").write_text(json.dumps({**whole, "name": "ore-11m:swept", "sweep": sweep}))
    return file


@pytest.fixture(scope="module")
def swept(smelt: Smelt, training: Path) -> dict[str, Any]:
    """The finished sweep."""
    return smelt("train", "sweep", str(training.parent / "sweep.yaml"))


@pytest.mark.parametrize("verb", list(verbs()))
def test_verb_does_what_it_says(
    verb: str,
    smelt: Smelt,
    reports: list[dict[str, Any]],
    training: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Not that it ends with 0: that its effect is there."""
    shutil.copytree(training.parent, tmp_path / "training")
    assert verb in CASES, f"`smelt {verb}` has no case here; add one that shows its effect"
    is_about_sweep = "swept" in signature(CASES[verb]).parameters
    CASES[verb](smelt, request.getfixturevalue("swept") if is_about_sweep else reports, tmp_path)


def pids(smelt: Smelt) -> dict[str, int]:
    """Process ids by name, 0 for what does not run."""
    return {item.name: item.pid for item in stack.status(smelt.home).components}


def started(smelt: Smelt) -> str:
    """The id of a fresh evaluation that is under way."""
    seed = str(secrets.randbelow(1 << 30))
    return str(smelt("eval", *SUITE, "--seed", seed, "--concurrency", "1", SMALL, "--no-wait")["id"])


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


@case("import")
def import_(smelt: Smelt, _: Any, folder: Path) -> None:
    shutil.copytree(MODEL, folder / "other")
    with (folder / "other" / "README.md").open("a") as card:
        card.write("Another card makes another bundle.\n")
    made = smelt("import", str(folder / "other"), "--name", "other:v1")
    assert not made["job"]["is_cached"]
    named = {model["name"]: model for model in smelt("models")["models"]}
    assert named["other:v1"]["digest"] == made["artifact"]["digest"] != named["ore-11m:latest"]["digest"]


@case("models")
def models(smelt: Smelt, *_: Any) -> None:
    listed = {model["name"]: model["size_bytes"] for model in smelt("models")["models"]}
    assert listed[SMALL] == smelt("inspect", SMALL)["artifact"]["size_bytes"] < listed["ore-11m:latest"]


@case("inspect")
def inspect(smelt: Smelt, *_: Any) -> None:
    found = smelt("inspect", "ore-11m")
    count = sum(tensor["size_bytes"] for tensor in found["tensors"]) // 2
    assert count == found["parameters"] > 10**7, "every parameter takes two bytes in bf16"


@case("check")
def check(smelt: Smelt, *_: Any) -> None:
    done = smelt("check", SMALL)
    assert {"bytes", "tensors", "contract"} <= {entry["check"] for entry in done["report"]["config"]["checks"]}
    assert done["report"]["digest"] == done["job"]["result_digest"]


@case("quantize")
def quantize(smelt: Smelt, *_: Any) -> None:
    """The plan is held against what comes of it: size and name."""
    plan = smelt("quantize", "ore-11m", "--scheme", "Q4_0", "--plan")
    made = smelt("quantize", "ore-11m", "--scheme", "Q4_0")
    size_bytes = made["artifact"]["size_bytes"]
    assert not made["job"]["is_cached"] and not plan["refusals"] and made["artifact"]["config"]["scheme"] == "Q4_0"
    assert abs(plan["write_bytes"] - size_bytes) < 0.02 * size_bytes


@case("run")
def run(smelt: Smelt, *_: Any) -> None:
    reply = smelt("run", SMALL, "-", "--max-tokens", "8", stdin="Write a function that adds two numbers.")
    assert reply["text"] and (reply["completion_tokens"], reply["finish_reason"]) == (8, "length")


@case("chat")
def chat(smelt: Smelt, *_: Any) -> None:
    ask = "Write a function that adds two numbers."
    said = smelt.run("chat", SMALL, stdin=f"{ask}\n")
    assert (said.returncode, said.stdout.strip()) == (0, smelt("run", SMALL, ask)["text"].strip()) and said.stdout


@case("eval")
def eval_(_: Smelt, reports: list[dict[str, Any]], *__: Any) -> None:
    assert [sum(report["verdicts"].values()) for report in reports] == [4, 4]
    assert len({report["digest"] for report in reports}) == 2


@case("judge")
def judge(smelt: Smelt, _: Any, folder: Path) -> None:
    """A right answer and a wrong one."""
    rows = [json.loads(line) for line in BASIC.read_text().splitlines()[:2]]
    texts = (rows[0]["canonical_solution"], "    return None\n")
    lines = (json.dumps({"task_id": row["task_id"], "completion": text}) for row, text in zip(rows, texts, strict=True))
    (folder / "completions.jsonl").write_text("\n".join(lines))
    judged = smelt("judge", *SUITE, "--completions", str(folder / "completions.jsonl"))
    assert (judged["passed"], judged["total"], judged["without_completion"]) == (1, 200, 198)
    assert [entry["passed"] for entry in judged["problems"][:2]] == [True, False]


@case("suites")
def suites(smelt: Smelt, *_: Any) -> None:
    assert {"basic": 200, "humaneval": 164}.items() <= {
        s["name"]: s["problems"] for s in smelt("suites")["suites"]
    }.items()


@case("references")
def references(smelt: Smelt, *_: Any) -> None:
    config = smelt("references", *SUITE)["record"]["config"]
    assert config["passed"] == config["total"] == 200


@case("report")
def report(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    """R-122: the numbers shown are those in the store."""
    shown = smelt("report", reports[0]["digest"], "--samples")
    with grpc.insecure_channel(stack.status(smelt.home).gateway_grpc) as channel:
        request = artifact_pb2.GetArtifactRequest(reference=reports[0]["digest"])
        reply = artifact_pb2_grpc.ArtifactServiceStub(channel).GetArtifact(request, timeout=10)
    stored = json.loads(reply.artifact.config_json)
    assert {name: stored["scores"][0][name] for name in shown["scores"][0]} == shown["scores"][0]
    assert (shown["verdicts"], shown["completion_tokens"]) == (stored["verdicts"], stored["completion_tokens"])
    assert sum(sample["completion_tokens"] for sample in shown["samples"]) == stored["completion_tokens"]


@case("results")
def results(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    listed = {entry["digest"]: entry["scores"] for entry in smelt("results")["results"]}
    assert [listed[report["digest"]] for report in reports] == [report["scores"] for report in reports]


@case("compare")
def compare(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    """By the digits that tables show."""
    baseline, candidate = (report["digest"].removeprefix("sha256:")[:12] for report in reports)
    found = smelt("compare", baseline, candidate)
    assert found["difference"] == reports[1]["scores"][0]["value"] - reports[0]["scores"][0]["value"]
    assert found["verdict"] == "no difference shown"


@case("gate")
def gate(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    """A partial score meets no gate."""
    done = smelt.run("gate", SMALL, "--clause", "basic pass@1 >= 0", "--report", reports[0]["digest"], "--json")
    (clause,) = json.loads(done.stdout)["clauses"]
    assert done.returncode == 1 and not clause["is_met"] and "partial" in clause["measured"]


@case("jobs ls")
def jobs_ls(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    listed = {job["id"]: job["create_time"] for job in smelt("jobs", "ls", "--service", "evaluator")["jobs"]}
    assert {report["job"] for report in reports} <= listed.keys()
    assert list(listed.values()) == sorted(listed.values(), reverse=True)


@case("jobs get")
def jobs_get(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    job = smelt("jobs", "get", reports[0]["job"])
    assert (job["state"], job["result_digest"]) == ("succeeded", reports[0]["digest"])


@case("jobs watch")
def jobs_watch(smelt: Smelt, *_: Any) -> None:
    begun = smelt("eval", *SUITE, "--limit", "2", "--seed", "203", SMALL, "--no-wait")
    watched = smelt("jobs", "watch", begun["id"])
    assert (watched["id"], watched["state"]) == (begun["id"], "succeeded") and watched["result_digest"]


@case("jobs cancel")
def jobs_cancel(smelt: Smelt, *_: Any) -> None:
    job_id = started(smelt)
    smelt("jobs", "cancel", job_id)
    assert smelt.run("jobs", "watch", job_id).returncode == 1
    assert smelt("jobs", "get", job_id)["state"] == "cancelled"


@case("jobs trace")
def jobs_trace(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    trace = smelt("jobs", "trace", reports[0]["job"])
    assert trace["trace_id"] == smelt("jobs", "get", reports[0]["job"])["trace_id"]
    assert {"cli", "gateway", "evaluator", "inference", "sandbox"} <= {span["service"] for span in trace["spans"]}


@case("jobs cost")
def jobs_cost(smelt: Smelt, reports: list[dict[str, Any]], *_: Any) -> None:
    found = {cost["name"]: cost for cost in smelt("jobs", "cost", "--limit", "1000")["costs"]}
    cost = found[reports[0]["job"]]
    assert (cost["kind"], cost["state"], cost["gpu_s"]) == ("evaluator evaluate", "succeeded", 0.0)
    assert cost["tokens"] == reports[0]["completion_tokens"] and cost["time_s"] == reports[0]["total_s"]


@case("train plan")
def train_plan(smelt: Smelt, _: Any, folder: Path) -> None:
    plan = smelt("train", "plan", str(folder / "training" / "training.yaml"))
    assert plan["memory_bytes"] > 0 and "number after 0 is 1." in str(plan["items"])
    assert "ore-11m:taught" not in [model["name"] for model in smelt("models")["models"]]


@case("train apply")
def train_apply(smelt: Smelt, _: Any, folder: Path) -> None:
    made = smelt("train", "apply", str(folder / "training" / "training.yaml"))
    assert made["artifact"]["digest"] == smelt("inspect", "ore-11m:taught")["artifact"]["digest"]
    (score,) = smelt("eval", *SUITE, "--limit", "2", "ore-11m:taught")["scores"]
    assert score["problems"] == 2, "weights that began at random generate, and are scored like any others"


@case("train watch")
def train_watch(smelt: Smelt, _: Any, folder: Path) -> None:
    job_id = smelt("train", "apply", str(folder / "training" / "training.yaml"), "--no-wait")["id"]
    watched = smelt("train", "watch", job_id)
    assert (watched["job"]["id"], watched["job"]["state"]) == (job_id, "succeeded")
    assert watched["run"]["outcome"]["tokens"] == watched["run"]["forecast"]["tokens"] > 0


@case("train sweep")
def train_sweep(smelt: Smelt, swept: dict[str, Any], folder: Path) -> None:
    planned = smelt("train", "sweep", str(folder / "training" / "sweep.yaml"), "--plan")["runs"]
    assert [run["settings"] for run in planned] == [{"learning_rate": 1e-2}, {"learning_rate": 2e-2}]
    assert all(run["plan"]["memory_bytes"] > 0 and run["plan"]["cached_digest"] for run in planned)
    losses = {run["name"]: run["heldout"]["after"] for run in swept["runs"]}
    assert set(losses) == {"ore-11m:swept-01", "ore-11m:swept-02"} and losses[swept["best"]] == min(losses.values())
    best = next(run["digest"] for run in swept["runs"] if run["name"] == swept["best"])
    assert smelt("inspect", "ore-11m:swept")["artifact"]["digest"] == best


@case("train archive")
def train_archive(smelt: Smelt, swept: dict[str, Any], folder: Path) -> None:
    made = smelt("train", "archive", "ore-11m:swept", str(folder / "swept.tar"))
    with tarfile.open(folder / "swept.tar") as archive:
        archive.extractall(folder / "out", filter="data")
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder / "out").returncode == 0
    assert json.loads((folder / "out" / "run.json").read_text())["digest"] == made["run"]
    assert {"model/model.safetensors", "model/tokenizer.json", "metrics.jsonl"} <= set(made["files"])
    assert made["bundle"] in [run["digest"] for run in swept["runs"]]


@case("monitor")
def monitor(smelt: Smelt, *_: Any) -> None:
    found = smelt("monitor", "--once")
    assert found["jobs"] == [] and found["leases"] == [] and found["at"].endswith("Z")


@case("gpus")
def gpus(smelt: Smelt, *_: Any) -> None:
    found = smelt("gpus")
    assert found["leases"] == [] and all(gpu["total_bytes"] > 0 for gpu in found["gpus"])


@case("runs ls")
def runs_ls(smelt: Smelt, swept: dict[str, Any], _: Path) -> None:
    found = {run["bundle"]: run for run in smelt("runs", "ls")["runs"]}
    for run in swept["runs"]:
        assert found[run["digest"]]["steps"] == 20 and found[run["digest"]]["heldout"] == run["heldout"]


@case("runs show")
def runs_show(smelt: Smelt, swept: dict[str, Any], _: Path) -> None:
    found = smelt("runs", "show", swept["best"])
    assert [step["step"] for step in found["curve"]] == list(range(1, 21))
    assert found["loss"] == {"first": found["curve"][0]["loss"], "last": found["curve"][-1]["loss"]}
    assert found["mfu"] > 0 and found["tokens_per_second"] > 0 and found["outcome"]["tokens"] > 0
    assert smelt.run("runs", "show", "ore-11m").returncode == 3, "an imported model has no run"


@case("runs diff")
def runs_diff(smelt: Smelt, swept: dict[str, Any], _: Path) -> None:
    found = smelt("runs", "diff", *(run["name"] for run in swept["runs"]))
    assert found["settings"] == {"learning_rate": [1e-2, 2e-2]} and not found["inputs"]
    assert found["is_same_training_data"] and found["is_same_heldout_data"]
    assert found["outcomes"]["heldout"][0] == swept["runs"][0]["heldout"]


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
