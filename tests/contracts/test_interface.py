"""What outsiders rely on stays what it was: the descriptor set, the reasons, the stubs on both protobuf runtimes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from smeltkit.errors import SmeltError, all_errors

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).parent / "buf"
STUBS = ["artifact", "job", "event", "importer", "trainer", "inference", "evaluator", "sandbox"]


def test_reason_registry_equals_the_error_tree() -> None:
    """Every error has its line in reasons.yaml with the same codes, and no line is left over."""
    registry = yaml.safe_load((ROOT / "contracts" / "interface" / "reasons.yaml").read_text())
    tree = all_errors()
    assert set(registry) == set(tree)
    for reason, cls in tree.items():
        row = registry[reason]
        assert (row["grpc"], row["http"], row["exit"], row["retryable"]) == (
            cls.grpc_status,
            cls.http_status,
            cls.exit_code,
            cls.retryable,
        )


def test_every_error_keeps_the_codes_of_its_family() -> None:
    """A leaf never changes status or exit code, so a family can be caught as one."""
    for cls in all_errors().values():
        parent = cls.__mro__[1]
        if issubclass(parent, SmeltError) and parent is not SmeltError:
            assert (cls.grpc_status, cls.http_status, cls.exit_code) == (
                parent.grpc_status,
                parent.http_status,
                parent.exit_code,
            )


@pytest.mark.parametrize(
    "old,new",
    [("string reference = 1;", "int32 reference = 1;"), ("  Artifact artifact = 1;\n", "  Artifact other = 2;\n")],
)
def test_breaking_change_of_the_contract_is_caught(tmp_path: Path, old: str, new: str) -> None:
    """A changed type and a removed field fail against the checked-in descriptor set."""
    (tmp_path / "proto").mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "proto" / "smelt"), str(tmp_path / "proto")], check=True)
    (tmp_path / "buf.yaml").write_text((ROOT / "buf.yaml").read_text())
    path = tmp_path / "proto" / "smelt" / "artifact" / "v1" / "artifact.proto"
    text = path.read_text()
    # A comment line stands before each field, so the first match is the field of GetArtifact's messages.
    assert old in text
    path.write_text(text.replace(old, new, 1))
    against = str(ROOT / "contracts" / "interface" / "smelt.binpb")
    command = [str(BUF), "breaking", "--against", against]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 100
    path.write_text(text)
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_stubs_load_on_the_oldest_protobuf_runtime() -> None:
    """The code generator's environment holds protobuf 6; the checked-in stubs must load there too."""
    code = "import google.protobuf, " + ", ".join(f"smelt.{name}.v1.{name}_pb2_grpc" for name in STUBS)
    code += "; print(google.protobuf.__version__)"
    done = subprocess.run(
        [str(ROOT / ".venv-proto" / "bin" / "python"), "-W", "error", "-c", code],
        cwd=ROOT / "proto" / "python",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6.")
