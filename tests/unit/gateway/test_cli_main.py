"""The command line itself: light help, lazy commands, documents and numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from smelt.artifact.v1 import artifact_pb2
from smelt.inference.v1 import inference_pb2
from smelt.job.v1 import job_pb2

from gateway.cli import main
from gateway.cli.documents import to_document
from gateway.cli.output import human_bytes, human_time
from gateway.cli.settings import check_settings
from smeltkit.config import environment
from smeltkit.errors import BadConfig, all_errors

HEAVY = ("grpc", "torch", "opentelemetry", "nats", "minio", "llama_cpp", "numpy", "httpx")


@pytest.mark.parametrize("arguments", ["--help", "eval --help", "jobs trace --help", "import --help", "run"])
def test_help_and_usage_errors_load_nothing_heavy(arguments: str) -> None:
    """Typing --help must not cost the start of gRPC, telemetry or an engine."""
    code = (
        "import sys\nfrom gateway.cli.main import app\n"
        f"try: app({arguments.split()!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", main._COMMANDS)
def test_command_in_the_table_exists_in_its_module(name: str) -> None:
    """The lazy table and the modules agree, and every command tells what it does."""
    command = main._load(name)
    assert command.help
    assert command.name == name or command.commands


@pytest.mark.parametrize("arguments,code", [(["bogus"], 2), (["eval", "ore"], 2), (["jobs", "watch"], 2)])
def test_wrong_use_ends_with_2(arguments: list[str], code: int) -> None:
    """Unknown commands and missing arguments."""
    command = [sys.executable, "-m", "gateway.cli.main", *arguments]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == code


def test_document_has_every_field_with_short_names() -> None:
    """Zeros are there, states are words, absent messages and optional values are null."""
    document = to_document(job_pb2.Job(id="job-1", state="JOB_STATE_RUNNING", revision=2**60))
    assert (document["state"], document["revision"], document["attempt"]) == ("running", 2**60, 0)
    assert (document["error"], document["create_time"], document["is_cached"]) == (None, None, False)
    sampling = to_document(inference_pb2.Sampling(temperature=0.7))
    assert (sampling["temperature"], sampling["top_k"]) == (0.7, None)


def test_document_opens_json_fields_and_leaves_out_unset_alternatives() -> None:
    """`config_json` is the value `config`; of a oneof only what is set appears."""
    assert to_document(artifact_pb2.Artifact(config_json='{"a": [1]}'))["config"] == {"a": [1]}
    request = to_document(inference_pb2.GenerateRequest(text="x"))
    assert request["text"] == "x"
    assert "chat" not in request and "tokens" not in request


@pytest.mark.parametrize(
    "size_bytes,text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (20.8 * 2**20, "20.8 MiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_are_readable(size_bytes: float, text: str) -> None:
    """Binary units, one decimal."""
    assert human_bytes(size_bytes) == text


@pytest.mark.parametrize("time_s,text", [(0.0042, "4.2 ms"), (0.85, "850 ms"), (12.34, "12.3 s"), (245, "4 min 05 s")])
def test_times_are_readable(time_s: float, text: str) -> None:
    """Milliseconds, seconds, minutes."""
    assert human_time(time_s) == text


def test_every_command_stands_on_the_page_of_the_command_line() -> None:
    """What scripts rely on is written down."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "api" / "cli.md").read_text()
    assert [name for name in main._COMMANDS if f"`{name}" not in page] == []


def test_exit_codes_on_the_page_are_those_of_the_errors() -> None:
    """Each code that an error can give is explained."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "api" / "cli.md").read_text()
    assert all(f"| {error.exit_code} |" in page for error in all_errors().values())


@pytest.mark.parametrize("command", [["models"], ["gc"]])
def test_a_setting_that_nobody_reads_is_refused_by_name(command: list[str]) -> None:
    """With a gateway and without one: a misspelt setting must not pass silently."""
    settings = environment({"SMELT_RPC_LISTENN": "127.0.0.1:1", "SMELT_GATEWAY": "127.0.0.1:1"})
    words = [sys.executable, "-m", "gateway.cli.main", *command]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, env=settings)
    assert ended.returncode == 2
    assert "BAD_CONFIG" in ended.stderr and "did you mean SMELT_RPC_LISTEN?" in ended.stderr


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("SMELT_IMPORTR_SLOTS", r"did you mean SMELT_IMPORTER_\*\?"),
        ("SMELT_FAST", "ours are SMELT_GATEWAY, SMELT_HOME"),
    ],
)
def test_a_variable_of_no_process_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, says: str) -> None:
    """R-006: also where the name of the process is what was misspelt."""
    check_settings()
    monkeypatch.setenv(variable, "1")
    with pytest.raises(BadConfig, match=says):
        check_settings()
