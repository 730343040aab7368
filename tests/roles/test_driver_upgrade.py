"""apt replaces the driver by the declared version, newer or older, in a local repository of empty packages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted
from programs import loaded

package = loaded(ROOT / "molecule/apt_repository.py").package
ROLE = ROOT / "roles/nvidia_driver"
NAMES = ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"]
CONFIG = """Dir "{0}/";
Dir::State::status "{0}/status";
Dir::Etc::sourcelist "{0}/sources.list";
Dir::Etc::sourceparts "{0}/none";
Dir::Etc::preferencesparts "{0}/preferences";
APT::Sandbox::User "";
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a repository with three branches of the driver, whose packages depend on each other's exact version."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "pool").mkdir()
    plain = []
    for version in ("570.86.15-1", "580.65.06-1", "580.95.05-1", "595.71.05-1"):
        plain += [package(folder / "pool", name, version, f"libcuda1 (= {version})") for name in NAMES]
        plain.append(package(folder / "pool", "libcuda1", version))
    (folder / "Packages").write_text("".join(plain))
    return folder


@pytest.mark.parametrize(
    ("installed", "declared", "result"),
    [
        ("570.86.15-1", {}, "580.95.05-1"),
        ("580.65.06-1", {}, "580.95.05-1"),
        ("595.71.05-1", {}, "580.95.05-1"),
        ("580.95.05-1", {"nvidia_driver_version": "580.65.06"}, "580.65.06-1"),
        ("580.65.06-1", {"nvidia_driver_branch": "595"}, "595.71.05-1"),
        ("580.95.05-1", {}, None),
    ],
)
def test_the_driver_becomes_the_declared_one(
    tmp_path: Path, repository: Path, installed: str, declared: dict[str, str], result: str | None
) -> None:
    cluster = Cluster(ROOT / "inventories/example", {})
    role, play = next((r, p) for r, p, _ in cluster.uses("playbooks/gpu.yml") if r.get_name() == "nvidia_driver")
    templar = Templar(cluster.loader, variables=cluster.variables("gpu1", play, role) | declared)
    for name in ("preferences", "lists/partial", "cache/archives/partial", "var/lib/apt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(CONFIG.format(tmp_path))
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{repository} ./\n")
    preferences = (ROLE / "templates/preferences.j2").read_text()
    (tmp_path / "preferences/driver.pref").write_text(str(templar.template(trusted(preferences), convert_data=False)))
    status = [paragraph for paragraph in (repository / "Packages").read_text().split("\n\n") if installed in paragraph]
    (tmp_path / "status").write_text("".join(f"Status: install ok installed\n{each}\n\n" for each in status))
    environment = {**os.environ, "APT_CONFIG": str(tmp_path / "apt.conf"), "LC_ALL": "C"}
    subprocess.run(["apt-get", "update"], env=environment, check=True, capture_output=True)

    tasks = yaml.safe_load((ROLE / "tasks/install.yml").read_text())
    task = next(task for task in tasks if task["name"].startswith("Upgrade the driver"))
    known = templar.available_variables | {"_nvidia_driver_wanted": NAMES}
    argv = Templar(cluster.loader, variables=known).template(trusted(task["ansible.builtin.command"]["argv"]))
    done = subprocess.run([*argv, "--simulate"], env=environment, check=True, capture_output=True, text=True)
    names = ["libcuda1", *NAMES] if result else []
    assert (
        sorted(line.split()[1] for line in done.stdout.splitlines() if line.startswith("Inst ")) == names
    ), done.stdout
    assert done.stdout.count(f"({result} ") == 2 * len(names), done.stdout
    unchanged = Templar(cluster.loader, variables={"_nvidia_driver_upgrade": {"stdout": done.stdout}})
    assert unchanged.template(trusted(f"{{{{ {task['changed_when']} }}}}")) is bool(result)
