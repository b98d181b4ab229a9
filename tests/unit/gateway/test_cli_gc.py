"""Clean-up from the command line: of this machine's platform only, and only of one that exists."""

from __future__ import annotations

import os
from pathlib import Path

from scripted_gateway import Gateway

NOWHERE = Gateway("127.0.0.1:1", {})


async def test_the_store_of_another_platform_is_not_cleaned_up_from_here() -> None:
    """R-112: its names and jobs could not be asked."""
    ended = await NOWHERE.smelt("gc", "--apply")
    assert ended.code == 2
    assert "UNSUPPORTED_OPTION" in ended.err and "where its store is" in ended.err


async def test_without_a_platform_there_is_nothing_to_clean_up(tmp_path: Path) -> None:
    """R-112: and nothing is started for it."""
    ended = await NOWHERE.smelt("gc", SMELT_GATEWAY="", SMELT_HOME=str(tmp_path))
    assert ended.code == 5
    assert "no platform was ever started" in ended.err
    assert not os.listdir(tmp_path)


async def test_a_least_age_below_two_days_is_refused() -> None:
    """R-112: work under way would be taken for garbage."""
    assert (await NOWHERE.smelt("gc", "--min-age-days", "1")).code == 2
