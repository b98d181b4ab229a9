"""`python -m smeltkit.blobs` makes the bucket that SMELT_PLATFORM_* name, unless it is there."""

from __future__ import annotations

import asyncio

from smeltkit.blobs.s3 import S3Store
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.service import run_command


async def _main() -> None:
    platform = from_environment(PlatformConfig, "SMELT_PLATFORM_")
    await asyncio.to_thread(S3Store(platform).ensure_bucket)


if __name__ == "__main__":
    run_command(_main)
