"""Where a result comes from: machine, versions and commit."""

import contextlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


__all__ = ["cpu_name", "git_commit", "installed_versions", "run_facts"]

_ROOT = Path(__file__).parent.parent


def run_facts(device: torch.device, packages: tuple[str, ...]) -> dict:
    """
    Machine, versions of packages and git commit (see `git_commit`), under the names that they have in `results.json`.
    """
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _host(device),
        "versions": installed_versions(packages),
        "git_commit": git_commit(_ROOT),
    }


def _host(device: torch.device) -> str:
    return f"GPU of {platform.machine()}, {platform.platform()}" if device.type == "mps" else cpu_name()


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Name -> version, of the packages that are installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def cpu_name() -> str:
    """Model of the CPU, where Linux tells it, and the threads that are used of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = f"{platform.machine()} CPU"
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def git_commit(checkout: Path) -> str | None:
    """
    The commit of a checkout, 40 digits, and -dirty where code, not a result or a document, differs from it. Where
    this folder is no checkout (an installed package, a copy), the variable GIT_COMMIT names it: a repository around
    it is somebody else's.
    """
    git = ["git", "-C", str(checkout)]
    try:
        if not (checkout / ".git").exists():
            raise FileNotFoundError
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
    code = ["*.py", "*.yaml", "*.toml", "*.txt"]
    is_dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode
    return head + "-dirty" * bool(is_dirty)
