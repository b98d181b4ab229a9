"""The service in a restricted container: no capability, no new privilege, and the seccomp profile that is shipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from as_container import PROFILE
from sandbox_service import REPOSITORY, sandbox_service
from smelt.sandbox.v1 import sandbox_pb2 as pb

from services.sandbox.kernel.container import container_calls, container_profile
from services.sandbox.kernel.numbers import AUDIT_ARCHITECTURES, numbers
from services.sandbox.kernel.seccomp import FilterPolicy, policy_calls, policy_rules

ENTRY = Path(__file__).with_name("as_container.py")
POD = REPOSITORY / "deploy" / "sandbox" / "pod.yaml"
TIMEOUT_S = 60


def test_shipped_profile_is_what_the_code_needs() -> None:
    """R-084: one list makes the jail's filter and the container's; the copy in deploy is not edited by hand."""
    assert json.loads(PROFILE.read_text()) == container_profile()
    policy = FilterPolicy(can_exec=True, can_memfd=True)
    assert set(container_calls()) >= {*policy_calls(policy), *(rule.name for rule in policy_rules(policy))}
    known = {name for architecture in AUDIT_ARCHITECTURES for name in numbers(architecture)}
    assert set(container_calls()) <= known


def test_profile_lets_no_dangerous_call_pass() -> None:
    """R-084: what reads other processes, loads code into the kernel or moves clocks is in no list."""
    dangerous = "ptrace bpf perf_event_open userfaultfd io_uring_setup keyctl add_key init_module kexec_load reboot"
    dangerous += " process_vm_readv process_vm_writev open_by_handle_at clock_settime settimeofday swapon chroot"
    assert not set(dangerous.split()) & set(container_calls())


@pytest.mark.parametrize(("kind", "level"), [("jailing", "rootless"), ("plain", "confined")])
def test_service_needs_no_capability(kind: str, level: str) -> None:
    """R-084: with the shipped profile the level is rootless; under a default one confined, if that is accepted."""
    double = pb.Candidate(
        code=b"def double(n): return 2 * n", form=pb.FORM_ASSERTS, tests="assert double(2) == 4", exports=["double"]
    )
    reads = pb.ExecuteRequest(code=b"print(open('/etc/passwd').read())")
    with sandbox_service(command=[sys.executable, str(ENTRY), kind], slots="1", level=level) as service:
        record = service.stub.Judge(pb.JudgeRequest(candidate=double), timeout=TIMEOUT_S).record
        assert (record.verdict, record.level) == (pb.VERDICT_PASSED, level)
        assert service.stub.Execute(reads, timeout=TIMEOUT_S).record.verdict == pb.VERDICT_EXCEPTION
        status = Path(f"/proc/{service.pid}/status").read_text()
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert [facts[name] for name in ("CapPrm", "CapEff", "CapAmb")] == ["0" * 16] * 3
        assert facts["NoNewPrivs"] == "1" and facts["Seccomp"] == "2" and not facts["Uid"].startswith("0\t")


def test_service_refuses_a_container_that_cannot_build_jails_unless_told() -> None:
    """R-084: under a default profile the message names the layer, what refused it, and the remedy."""
    ended = subprocess.run(
        [sys.executable, str(ENTRY), "plain"],
        env={**os.environ, "SMELT_RPC_LISTEN": "127.0.0.1:0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode != 0
    assert "ISOLATION_TOO_WEAK" in ended.stdout and "EPERM" in ended.stdout and "seccomp profile" in ended.stdout


def test_example_pod_is_restricted_and_names_the_profile() -> None:
    """R-084: nothing that the restricted policy forbids, no token, no way out."""
    pod, policy = yaml.safe_load_all(POD.read_text())
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["seccompProfile"] == {
        "type": "Localhost",
        "localhostProfile": f"smelt/{PROFILE.parent.name}-{PROFILE.name}",
    }
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert policy["spec"]["egress"] == [] and "Egress" in policy["spec"]["policyTypes"]
