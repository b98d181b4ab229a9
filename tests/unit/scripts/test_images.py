"""What is said about an image is true: each broken promise is named, and the bill of materials is complete."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.images import bill, builder, judge
from scripts.images.__main__ import write_sums
from scripts.images.catalogue import CONTAINERFILE, ROOT, Image, chosen, document, images, labels
from scripts.manifests.tree import SERVICES
from smeltkit.errors import BadRequest

IMAGE = Image(name="gateway", module="gateway", budget_mib=1)
PACKAGES = "opt/smelt/lib/python3.11/site-packages"
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u10

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The smallest root file system with nothing wrong."""
    (tmp_path / PACKAGES / "gateway").mkdir(parents=True)
    (tmp_path / PACKAGES / "gateway" / "__main__.py").touch()
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3.11").touch(mode=0o755)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    add_package(tmp_path, "alpha", "License-Expression: MIT")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    return tmp_path


def add_package(root: Path, name: str, *lines: str) -> None:
    folder = root / PACKAGES / f"{name}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines, ""]))


def add_driver(root: Path) -> Path:
    """What Triton compiles on its first GPU."""
    source = root / PACKAGES / "triton" / "backends" / "nvidia" / "driver.c"
    source.parent.mkdir(parents=True)
    source.write_text("int launch;")
    return source


def described(**changes: Any) -> dict[str, Any]:
    config = {"User": "10001:10001", "Cmd": ["python", "-m", "gateway"], "Labels": labels()}
    return {"config": config | changes}


def test_an_image_that_keeps_its_promises_has_no_mistakes(root: Path) -> None:
    assert list(judge.mistakes(IMAGE, root, described())) == []


@pytest.mark.parametrize(
    ("named", "spoil"),
    [
        ("a compiler is inside: usr/bin/gcc-12", lambda root: (root / "usr/bin/gcc-12").touch()),
        ("inside: usr/bin/x86_64-linux-gnu-ld", lambda root: (root / "usr/bin/x86_64-linux-gnu-ld").touch()),
        ("an installer is inside: usr/bin/pip3.11", lambda root: (root / "usr/bin/pip3.11").touch()),
        ("torch is inside", lambda root: (root / PACKAGES / "torch").mkdir()),
        ("would look for a C compiler", lambda root: add_driver(root)),
        ("/usr/bin/python3.11 runs with another's rights", lambda root: (root / "usr/bin/python3.11").chmod(0o4755)),
        ("/usr/bin may be written by anybody", lambda root: (root / "usr/bin").chmod(0o777)),
        ("python -m gateway would not start", lambda root: (root / PACKAGES / "gateway/__main__.py").unlink()),
        ("MiB unpacked; its budget is 1 MiB", lambda root: (root / "usr/big").write_bytes(bytes(2 * judge.MIB))),
    ],
)  # fmt: skip
def test_each_broken_promise_of_the_files_is_named(root: Path, named: str, spoil: Callable[[Path], object]) -> None:
    spoil(root)
    found = list(judge.mistakes(IMAGE, root, described()))
    assert len(found) == 1 and named in found[0], found


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("it runs as 'root'", {"User": ""}),
        ("it runs as '0:0'", {"User": "0:0"}),
        ("it runs as 'smelt'", {"User": "smelt"}),
        ("must be python -m gateway", {"Cmd": ["/bin/sh", "-c", "python -m gateway"]}),
        ("must be python -m gateway", {"Entrypoint": ["/bin/sh"]}),
        ("image.revision", {"Labels": {**labels(), "org.opencontainers.image.revision": "main"}}),
        ("dev.smelt.contract", {"Labels": {**labels(), "dev.smelt.contract": "sha256:0"}}),
    ],
)
def test_each_broken_promise_of_the_description_is_named(root: Path, named: str, changes: dict[str, Any]) -> None:
    found = list(judge.mistakes(IMAGE, root, described(**changes)))
    assert len(found) == 1 and named in found[0], found


def test_triton_is_handed_its_own_driver_and_nothing_else(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called as Triton calls a compiler; the source lies in a temporary folder then."""
    driver = add_driver(root)
    driver.with_suffix(".compiled").write_text("compiled")
    monkeypatch.setattr(sys, "prefix", str(root / "opt/smelt"))
    compiler = runpy.run_path(str(CONTAINERFILE.with_name("triton_cc.py")))["main"]
    asked, made = tmp_path / "main.c", tmp_path / "main.so"
    asked.write_text(driver.read_text())
    assert compiler([str(asked), "-O3", "-shared", "-o", str(made), "-lcuda"]) is None
    assert made.read_text() == "compiled"
    asked.write_text("int other;")
    assert "no C compiler" in compiler([str(asked), "-o", str(made)])


def test_a_file_with_two_names_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(1000))
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    assert judge.unpacked_bytes(tmp_path) == 1000


def test_the_bill_holds_each_installed_package_and_is_the_same_for_the_same_image(root: Path) -> None:
    made = bill.bill_of(root, IMAGE, "0.1.0")
    assert [item["purl"] for item in made["components"]] == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=bookworm",
        "pkg:pypi/alpha@1.0",
    ]
    assert made == bill.bill_of(root, IMAGE, "0.1.0")
    assert list(bill.licence_errors(made, IMAGE)) == []


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ((), "names no licence"),
        (("License: GPL-3.0-or-later",), "GPL-3.0-or-later, which is not allowed"),
        (("License-Expression: MIT AND GPL-2.0-only",), "not allowed"),
        (("License-Expression: NVIDIA Proprietary Software",), "not allowed"),
        (("License-Expression: GPL-2.0-only OR MIT",), ""),
        (("License: Apache 2.0",), ""),
        (("Classifier: License :: OSI Approved :: BSD License",), ""),
    ],
)
def test_a_licence_that_is_not_allowed_is_named(root: Path, lines: tuple[str, ...], named: str) -> None:
    add_package(root, "beta", *lines)
    found = list(bill.licence_errors(bill.bill_of(root, IMAGE, "0.1.0"), IMAGE))
    assert [named in line for line in found] == ([True] if named else []), found


@pytest.mark.parametrize(("file", "count"), [("beta-1.0.dist-info/METADATA", 0), ("beta/library.so", 1)])
def test_a_package_that_only_names_others_needs_no_licence(root: Path, file: str, count: int) -> None:
    add_package(root, "beta")
    (root / PACKAGES / "beta-1.0.dist-info" / "RECORD").write_text(f"{file},,\n")
    (root / PACKAGES / file).parent.mkdir(exist_ok=True)
    (root / PACKAGES / file).touch()
    assert len(list(bill.licence_errors(bill.bill_of(root, IMAGE, "0.1.0"), IMAGE))) == count


def test_what_is_installed_here_stands_under_known_words() -> None:
    """Each spelling is one that packages use, and each leads to a licence that is allowed."""
    assert set(document()["spellings"].values()) <= set(document()["licences"])


def test_settings_of_pip_are_lent_under_a_neutral_name() -> None:
    told = "global.cert='/etc/ca.crt'\nglobal.find-links='/opt/a /opt/b'\n:env:.find-links='/opt/a'\nglobal.pre='x'\n"
    told += "global.extra-index-url='file:///srv/py/simple https://example.com/simple'\n"
    text, places = builder.lent_pip_settings(told)
    assert text.splitlines() == [
        "[global]",
        "cert = /run/machine/place-0",
        "find-links = /run/machine/place-1 /run/machine/place-2",
        "extra-index-url = file:///run/machine/place-3/simple https://example.com/simple",
    ]
    assert places == {"/etc/ca.crt": "place-0", "/opt/a": "place-1", "/opt/b": "place-2", "/srv/py": "place-3"}


def test_each_image_is_a_target_and_each_service_has_one() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", CONTAINERFILE.read_text(), flags=re.MULTILINE))
    assert set(images()) <= targets
    assert set(SERVICES) <= set(images())
    assert builder.pinned_base().startswith("debian:bookworm-slim@sha256:")


def test_saved_images_are_told_from_damaged_ones(tmp_path: Path) -> None:
    """By the tool that every machine has."""
    (tmp_path / "gateway.tar").write_bytes(b"image")
    (tmp_path / "images.yaml").write_text("images: []")
    write_sums(tmp_path)
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path).returncode == 0
    (tmp_path / "gateway.tar").write_bytes(b"imagf")
    damaged = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert damaged.returncode == 1 and "gateway.tar" in damaged.stdout


def test_an_image_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match="there are gateway, importer"):
        chosen(["gatway"])
    assert "trainer-cuda" not in [image.name for image in chosen([])]


def test_the_page_gives_the_sizes_of_the_last_runs() -> None:
    """A dash for what was not built in them, and the budget of each."""
    results = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("images", "images_cuda")]
    built = {row["image"]: row["mib"] for path in results for row in json.loads(path.read_text())["rows"]}
    page = (ROOT / "docs" / "deploy.md").read_text()
    told = dict(re.findall(r"^\| `([\w-]+)` \| (\S+ of \d+) MiB \|", page, flags=re.MULTILINE))
    assert told == {name: f"{built.get(name, '-')} of {image.budget_mib}" for name, image in images().items()}
