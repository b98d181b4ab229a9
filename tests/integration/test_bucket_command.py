"""`python -m smeltkit.blobs`: what a cluster runs once, before anything is stored."""

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
    assert refused.returncode != 0 and "SMELT_PLATFORM_S3_SECRET_KEY" in refused.stderr
