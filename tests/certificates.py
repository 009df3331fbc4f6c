"""Certificates for tests over TLS, made with openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(folder: Path, *args: str) -> None:
    subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)


def authority(folder: Path, name: str) -> None:
    """A certificate authority: `<name>.pem` and `<name>.key`."""
    made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl(folder, "req", "-x509", *made, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")


def certificate(folder: Path, ca: str, name: str, *, of: str = "IP:127.0.0.1") -> None:
    """A certificate of a host, signed by `ca`: `<name>.pem` and `<name>.key`."""
    made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}")
    openssl(folder, "req", *made, "-keyout", f"{name}.key", "-out", f"{name}.csr")
    (folder / "extensions").write_text(f"subjectAltName={of}\nextendedKeyUsage=serverAuth,clientAuth\n")
    signed = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions")
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
