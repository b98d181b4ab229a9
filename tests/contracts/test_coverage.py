"""The table of requirements and tests: complete, exact, and not to be talked round."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from contracts import coverage
from contracts.coverage import Mention, Requirement, covered, find_mentions, read_passed, read_requirements, render
from smeltkit.errors import BadConfig

TEXT = "It holds."
A_TEST = '''
def test_one() -> None:
    """R-001 and R-002: two at once; R-1234 is none."""

async def test_two() -> None:
    """Decides nothing."""

def helper() -> None:
    """R-003 in a helper decides nothing."""

class TestGroup:
    """R-004: all of the group."""

    def test_three(self) -> None:
        """R-005."""
'''


def requirement(id: str, *, is_built: bool = True) -> Requirement:
    return Requirement(id=id, text=TEXT, component="platform", is_built=is_built)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tests."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text(A_TEST)
    return tests


def test_all_130_requirements_are_there_in_order() -> None:
    assert list(read_requirements()) == [f"R-{number:03d}" for number in range(1, 131)]


def test_every_requirement_is_one_sentence_of_its_own() -> None:
    texts = [entry.text for entry in read_requirements().values()]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text.isascii() and text.endswith(".") and len(text) <= 180, text
        assert not re.search(r"[.!?] [A-Z]", text), text


def test_no_test_of_this_repository_names_an_unknown_requirement() -> None:
    """R-102: what a test claims to decide exists."""
    mentioned = {mention.id for mention in find_mentions(coverage.ROOT / "tests")}
    assert mentioned
    assert mentioned <= set(read_requirements())


def test_ids_are_found_in_docstrings_of_tests_classes_and_modules(folder: Path) -> None:
    (folder / "test_b.py").write_text('"""R-006 for all here."""\n\ndef test_four() -> None: ...\n')
    assert find_mentions(folder) == [
        Mention(id="R-001", test="tests/test_a.py::test_one"),
        Mention(id="R-002", test="tests/test_a.py::test_one"),
        Mention(id="R-004", test="tests/test_a.py::TestGroup::test_three"),
        Mention(id="R-005", test="tests/test_a.py::TestGroup::test_three"),
        Mention(id="R-006", test="tests/test_b.py::test_four"),
    ]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[x]"/>
<testcase classname="tests.test_a" name="test_one[y.z]"/>
<testcase classname="tests.test_a.TestGroup" name="test_three"/>
<testcase classname="tests.test_b" name="test_four[a]"/>
<testcase classname="tests.test_b" name="test_four[b]"><failure message="no"/></testcase>
<testcase classname="tests.test_b" name="test_five"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_with_a_report_only_tests_that_ran_and_passed_count(tmp_path: Path) -> None:
    """R-102: neither a skipped nor a failed nor a missing test covers anything."""
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert read_passed(report) == {"tests.test_a.test_one", "tests.test_a.TestGroup.test_three"}
    mentions = [
        Mention(id="R-001", test="tests/test_a.py::test_one"),
        Mention(id="R-002", test="tests/test_a.py::TestGroup::test_three"),
        Mention(id="R-003", test="tests/test_b.py::test_four"),
        Mention(id="R-004", test="tests/test_b.py::test_five"),
        Mention(id="R-005", test="tests/test_b.py::test_never_ran"),
    ]
    assert set(covered(mentions, read_passed(report))) == {"R-001", "R-002"}
    assert len(covered(mentions, None)) == 5


def test_the_table_names_what_is_undecided_and_what_is_not_built() -> None:
    requirements = {entry.id: entry for entry in (requirement("R-001"), requirement("R-002"))}
    requirements["R-003"] = requirement("R-003", is_built=False)
    table = render(requirements, {"R-001": ["tests/test_a.py::test_one"]})
    assert "1 of 2 requirements of built components are decided by a test" in table
    assert "undecided: R-002" in table
    assert "1 wait for components that are not built yet" in table
    assert "tests/test_a.py::test_one" in table
    assert "R-003" not in table


@pytest.mark.parametrize("id", ["R-999", "R-000"])
def test_an_unknown_id_ends_with_1_and_names_the_test(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], id: str
) -> None:
    (folder / "test_a.py").write_text(f'def test_one() -> None:\n    """{id}: what?"""\n')
    monkeypatch.setattr(coverage, "ROOT", folder.parent)
    assert coverage.main([]) == 1
    assert f"tests/test_a.py::test_one names {id}" in capsys.readouterr().err


def test_known_ids_end_with_0_however_few_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coverage, "ROOT", folder.parent)
    assert coverage.main([]) == 0
    assert "undecided: " in capsys.readouterr().out


def test_wrong_use_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["--what"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "components: {}",
        "components: {a: {is_built: true}}\nrequirements: {R-1: {component: a, text: x}}",
        "components: {a: {is_built: true}}\nrequirements: {R-001: {component: b, text: x}}",
        "components: {a: {is_built: true}}\nrequirements: {R-001: {component: a, text: x, source: y}}",
        "components: {a: {is_built: true}}\nrequirements: {R-001: {component: a}}",
        "components: [",
    ],
)
def test_a_malformed_registry_is_refused(tmp_path: Path, text: str) -> None:
    """R-014: it breaks the build instead of being passed over."""
    path = tmp_path / "requirements.yaml"
    path.write_text(text)
    with pytest.raises(BadConfig, match="requirements.yaml"):
        read_requirements(path)
