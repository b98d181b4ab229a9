"""An authority of one's own and certificates from it, by the openssl command: for one machine, and for tests.

A cluster has cert-manager instead. `folder/authority` holds the authority's key: who has it may be every service.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadConfig
from smeltkit.rpc.tls import AUTHORITY, CERTIFICATE, KEY

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_authority(folder: Path) -> Path:
    """The folder of the authority below `folder`, made unless it is there, readable by its owner only."""
    home = folder / "authority"
    if not (home / CERTIFICATE).exists():
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        extensions = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        _openssl(home, "req", "-x509", *_NEW_KEY, "-keyout", KEY, "-out", CERTIFICATE, "-days", "3650", *extensions)
    return home


def issue(authority: Path, folder: Path, name: str, *, days: int = limits.CERTIFICATE_DAYS) -> Path:
    """`folder` with a fresh certificate for the service `name` and its key, as `smeltkit.rpc.tls.Identity` reads them.

    The key is replaced first and the certificate last: processes that look meanwhile keep what they have.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    extensions = [f"subjectAltName=DNS:{name}", "extendedKeyUsage=serverAuth,clientAuth", "basicConstraints=CA:FALSE"]
    added = [word for extension in extensions for word in ("-addext", extension)]
    _openssl(folder, "req", "-new", *_NEW_KEY, "-keyout", "new.key", "-out", "new.csr", *added, name=name)
    signing = ("-CA", str(authority / CERTIFICATE), "-CAkey", str(authority / KEY), "-copy_extensions", "copyall")
    _openssl(folder, "x509", "-req", "-in", "new.csr", *signing, "-days", str(days), "-out", "new.crt")
    (folder / "new.csr").unlink()
    shutil.copyfile(authority / CERTIFICATE, folder / "new.ca")
    for new, target in (("new.ca", AUTHORITY), ("new.key", KEY), ("new.crt", CERTIFICATE)):
        (folder / new).replace(folder / target)
    return folder


def _openssl(folder: Path, command: str, *arguments: str, name: str = "smelt") -> None:
    subject = ("-subj", f"/CN={name}") if command == "req" else ()
    try:
        done = subprocess.run(
            ["openssl", command, *arguments, *subject], cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise BadConfig(
            "openssl is not installed; install it (apt-get install openssl), or bring certificates"
        ) from error
    if done.returncode:
        raise BadConfig(f"openssl {command} failed below {folder}: {done.stderr.strip()[-200:]}")
