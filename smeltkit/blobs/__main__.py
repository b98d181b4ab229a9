"""`python -m smeltkit.blobs` makes the bucket that SMELT_PLATFORM_* name, unless it is there."""

from __future__ import annotations

from smeltkit.blobs.s3 import S3Store
from smeltkit.config import PlatformConfig, from_environment

if __name__ == "__main__":
    S3Store(from_environment(PlatformConfig, "SMELT_PLATFORM_")).ensure_bucket()
