"""What a cluster runs once: `python -m smeltkit.blobs` and `smeltkit.bus.topology`, and how they say what is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from smeltkit.blobs.s3 import S3Store
from smeltkit.config import PlatformConfig, environment
from smeltkit.testing.s3 import S3Server


def _run(platform: PlatformConfig) -> subprocess.CompletedProcess[str]:
    settings = {
        "SMELT_PLATFORM_NATS_URL": "nats://unused:4222",
        "SMELT_PLATFORM_S3_ENDPOINT": platform.s3_endpoint,
        "SMELT_PLATFORM_S3_ACCESS_KEY": platform.s3_access_key,
        "SMELT_PLATFORM_S3_SECRET_KEY": platform.s3_secret_key,
        "SMELT_PLATFORM_S3_BUCKET": platform.s3_bucket,
    }
    command = [sys.executable, "-m", "smeltkit.blobs"]
    return subprocess.run(command, env=environment(settings), capture_output=True, text=True, check=False)


def test_the_bucket_is_made_once_and_a_wrong_key_is_named(platform: PlatformConfig, s3: S3Server) -> None:
    fresh = replace(platform, s3_bucket="made-by-the-command")
    assert _run(fresh).returncode == 0
    assert _run(fresh).returncode == 0
    assert S3Store(fresh).takes_writes()
    refused = _run(replace(fresh, s3_secret_key="wrong"))
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 6 and line.startswith("STORE_DENIED: ") and "SMELT_PLATFORM_S3_SECRET_KEY" in line


def test_more_copies_than_servers_are_refused_with_the_setting_that_asks_for_them(nats_url: str) -> None:
    settings = {
        "SMELT_PLATFORM_NATS_URL": nats_url,
        "SMELT_PLATFORM_NATS_REPLICAS": "3",
        "SMELT_PLATFORM_S3_ENDPOINT": "",
    }
    command = [sys.executable, "-m", "smeltkit.bus.topology"]
    refused = subprocess.run(command, env=environment(settings), capture_output=True, text=True, check=False)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and line.startswith("BAD_CONFIG: NATS refuses") and "NATS_REPLICAS must be" in line
