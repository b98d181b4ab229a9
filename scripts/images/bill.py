"""Bill of materials of an image as CycloneDX 1.6, read off its files; and whether its licences are allowed.

Python packages are told by their metadata, Debian's by dpkg and the copyright file of each. The same image gives the
same document: it holds no time and no random number.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scripts.images.catalogue import Image, document

PACKAGES = ("opt/smelt", "opt/science")
"""Folders of an image that hold Python packages."""
OURS = frozenset({"smelt", "smelt-proto"})
EMPTY = {"name": "smelt:is_empty", "value": "true"}
"""Said of a package without files, which needs no licence."""


def bill_of(root: Path, image: Image, version: str) -> dict[str, Any]:
    """The document for the file system at `root`; components sorted by their package URL."""
    components = sorted([*_python(root), *_debian(root)], key=lambda component: str(component["purl"]))
    content = json.dumps(components, sort_keys=True)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, f"{image.name}@{version}#{content}").urn,
        "version": 1,
        "metadata": {"component": {"type": "container", "name": f"smelt/{image.name}", "version": version}},
        "components": components,
    }


def licence_errors(bill: Mapping[str, Any], image: Image) -> Iterator[str]:
    """One line for each Python package that stands under a licence that is not allowed, or under none that is named."""
    allowed = set(document()["licences"]) | set(document()["licences_of_cuda"] if image.needs == "cuda" else ())
    for component in bill["components"]:
        if not component["purl"].startswith("pkg:pypi/"):
            continue
        told = [entry.get("expression") or entry["license"]["name"] for entry in component.get("licenses", ())]
        if not told and EMPTY not in component.get("properties", ()):
            yield f"{component['name']} {component['version']} names no licence"
        for expression in told:
            if not is_allowed(expression, allowed):
                yield f"{component['name']} {component['version']} stands under {expression}, which is not allowed"


def is_allowed(expression: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression can be met by allowed licences: all of an AND, one of an OR; no nesting of the two."""
    parts = re.split(r"\s+OR\s+", expression.strip("() "))
    return any(all(word.strip("() ") in allowed for word in re.split(r"\s+AND\s+", part)) for part in parts)


def licence_of(distribution: Distribution) -> str:
    """What a distribution says it stands under, as an SPDX expression where its words are known; empty if nothing."""
    metadata: Any = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    spellings: Mapping[str, str] = document()["spellings"]
    classifiers = metadata.get_all("Classifier") or []
    named = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License :: OSI Approved ::")]
    free = (metadata.get("License") or "").strip()
    told = [free] if free and "\n" not in free else named
    return " OR ".join(dict.fromkeys(spellings.get(text, text) for text in told))


def _python(root: Path) -> Iterator[dict[str, Any]]:
    places = [path for folder in PACKAGES for path in _site_packages(root / folder)]
    for found in distributions(path=[str(path) for path in places]):
        name = re.sub(r"[-_.]+", "-", found.name).lower()
        licence = licence_of(found)
        yield {
            "type": "application" if name in OURS else "library",
            "name": name,
            "version": found.version,
            "purl": f"pkg:pypi/{name}@{quote(found.version)}",
            **({"licenses": [{"expression": licence}]} if licence else {}),
            **({"properties": [EMPTY]} if _is_empty(found) else {}),
        }


def _is_empty(distribution: Distribution) -> bool:
    """Whether it only names others: there is nothing of it but its own metadata."""
    files = distribution.files
    return files is not None and all(path.parts[0].endswith(".dist-info") for path in files)


def _site_packages(folder: Path) -> Sequence[Path]:
    return [*folder.glob("lib/python3*/site-packages"), *([folder] if any(folder.glob("*.dist-info")) else ())]


def _debian(root: Path) -> Iterator[dict[str, Any]]:
    for paragraph in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        facts = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, flags=re.MULTILINE))
        if facts.get("Status") != "install ok installed":
            continue
        name, version = facts["Package"], facts["Version"]
        licences = [
            {"license": {"name": text}} for text in _debian_licences(root / "usr/share/doc" / name / "copyright")
        ]
        yield {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/debian/{name}@{quote(version)}?arch={facts['Architecture']}&distro=bookworm",
            **({"licenses": licences} if licences else {}),
        }


def _debian_licences(path: Path) -> list[str]:
    """Names in a machine-readable copyright file; none where it is prose."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    if not text.startswith("Format:"):
        return []
    return sorted(set(re.findall(r"^License: *(\S.*)$", text, flags=re.MULTILINE)))
