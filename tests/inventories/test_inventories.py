"""Both inventories work with the same playbooks, groups and cluster variables."""

from __future__ import annotations

import ipaddress
import re
import subprocess

import pytest
import yaml
from cluster import ROOT, Cluster

INVENTORIES = ("lab", "example")
SCHEMA = yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())


def playbook(*arguments: str) -> str:
    """Runs ansible-playbook in the repository and returns its output."""
    done = subprocess.run(["ansible-playbook", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_site_yml_parses(inventory: str) -> None:
    playbook("-i", f"inventories/{inventory}", "--syntax-check", "site.yml")


def test_every_role_of_the_platform_is_in_site_yml() -> None:
    tasks = playbook("-i", "inventories/example", "--list-tasks", "site.yml")
    listed = set(re.findall(r"^ {6}(\w+) : ", tasks, re.MULTILINE))
    # Roles that other roles include need no play.
    tasks = "".join(file.read_text() for file in (ROOT / "roles").glob("*/tasks/*.yml"))
    included = set(re.findall(r"(?:include|import)_role:\n +name: (\w+)", tasks))
    # playbooks/lab.yml creates the lab's machines; other inventories have existing ones.
    # playbooks/artifacts.yml fills a mirror before site.yml runs.
    assert listed | included == {path.name for path in (ROOT / "roles").iterdir()} - {"lab", "artifacts"}


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_an_inventory_has_every_group(inventory: str) -> None:
    assert set(SCHEMA["groups"]) <= set(Cluster(ROOT / "inventories" / inventory).hosts)


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_every_host_has_an_address(inventory: str) -> None:
    cluster = Cluster(ROOT / "inventories" / inventory)
    play = cluster.plays("playbooks/common.yml")[0]
    for host in cluster.hosts["all"]:
        variables = cluster.variables(host, play)
        ipaddress.ip_address(variables["hostvars"][host]["ansible_host"])


def test_the_example_uses_addresses_that_nobody_has() -> None:
    cluster = Cluster(ROOT / "inventories/example")
    reserved = ipaddress.ip_network("192.0.2.0/24")  # RFC 5737
    for host in cluster.hosts["all"]:
        assert ipaddress.ip_address(cluster.inventory.get_host(host).vars["ansible_host"]) in reserved


def test_the_example_is_the_cluster_that_it_says_it_is() -> None:
    hosts = Cluster(ROOT / "inventories/example").hosts
    sizes = {group: len(hosts[group]) for group in ("slurm_controller", "slurm_compute", "slurm_login", "k3s_server")}
    assert sizes == {"slurm_controller": 2, "slurm_compute": 4, "slurm_login": 1, "k3s_server": 3}


def test_the_schema_has_every_cluster_variable_that_playbooks_use_and_no_other() -> None:
    files = [ROOT / "site.yml", *(ROOT / "playbooks").glob("*.yml"), *(ROOT / "playbooks/vars").glob("*.yml")]
    # A group that preflight creates.
    used = set(re.findall(r"\bictx_\w+", "\n".join(file.read_text() for file in files))) - {"ictx_skipped"}
    assert used == {name for name in SCHEMA["variables"] if name.startswith("ictx_")}


def test_every_group_that_playbooks_use_exists_in_every_valid_inventory() -> None:
    files = (ROOT / "playbooks").rglob("*.yml")
    used = set(re.findall(r"\bgroups\['(\w+)", "\n".join(file.read_text() for file in files)))
    # Preflight creates ictx_skipped; only the lab's playbooks use lab_nodes.
    assert used - {"all", "ictx_skipped", "lab_nodes"} <= set(SCHEMA["groups"])


def test_no_role_knows_the_cluster_or_its_groups() -> None:
    known = re.compile(r"\bictx_[a-z]+_?\w*|\bgroup_names\b|\bgroups\[")
    for file in sorted((ROOT / "roles").glob("*/*/**/*.y*ml")) + sorted((ROOT / "roles").glob("*/templates/**/*.j2")):
        # Prometheus' rules and textfiles contain names of metrics, not variables.
        metrics = file.parent.name == "rules" or file.name.endswith(".prom.j2")
        if file.relative_to(ROOT).parts[1] != "lab" and not metrics:
            assert not known.findall(re.sub(r"(?m)^\s*#.*$", "", file.read_text())), file
