"""Every file uses the same address of a host: a name, an IPv6 address, or one other than Ansible's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted

NAMES = "{}"
IPV6 = '{ansible_host: "fd00:10::N"}'
APART = "{ansible_host: 198.51.100.N, ictx_address: 192.0.2.N}"


def inventory(folder: Path, address: str) -> Path:
    """Returns a copy of the example with two Alertmanagers and other addresses; N is replaced with a host's number."""
    copy = shutil.copytree(ROOT / "inventories/example", folder / "inventory")
    text = (copy / "hosts.yml").read_text()
    text = re.sub(r"\{ansible_host: 192\.0\.2\.(\d+)\}", lambda found: address.replace("N", found[1]), text)
    content = yaml.safe_load(text)
    content["all"]["children"]["alertmanager"]["hosts"]["db1"] = None
    (copy / "hosts.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    return copy


class Site:
    """Renders templates and expressions for a host of an inventory."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.cluster = Cluster(path, {"ictx_state_dir": str(folder)})
        self.uses = {
            (role.get_name(), host): (role, play)
            for role, play, hosts in self.cluster.uses("site.yml")
            for host in hosts
        }

    def variables(self, role: str, host: str) -> dict[str, Any]:
        """Returns the variables of a role's tasks."""
        role_of, play = self.uses[role, host]
        return self.cluster.variables(host, play, role_of)

    def value(self, role: str, host: str, expression: str) -> Any:
        """Returns the value of an expression in a role."""
        return Templar(self.cluster.loader, variables=self.variables(role, host)).template(trusted(expression))

    def text(self, role: str, template: str, host: str) -> str:
        """Returns a template's text."""
        return self.cluster.render(ROOT / "roles" / role / "templates" / template, self.variables(role, host))


@pytest.mark.parametrize(
    ("address", "plain", "in_url"),
    [
        (NAMES, "{name}", "{name}"),
        (IPV6, "fd00:10::{number}", "[fd00:10::{number}]"),
        (APART, "192.0.2.{number}", "192.0.2.{number}"),
    ],
    ids=["names", "ipv6", "apart"],
)
def test_every_file_has_the_host_s_address(tmp_path: Path, address: str, plain: str, in_url: str) -> None:
    site = Site(inventory(tmp_path, address), tmp_path)

    def at(name: str, number: int, form: str = plain) -> str:
        return form.format(name=name, number=number)

    conf = site.text("slurm", "slurm.conf.j2", "ctl1")
    assert f"SlurmctldHost=ctl1({at('ctl1', 11)})" in conf
    (nodes,) = re.findall("^NodeName=.*", conf, re.MULTILINE)
    assert nodes.split()[0] == "NodeName=gpu[1-4]"
    expected = plain.format(name="", number="[21-24]")
    assert ("NodeAddr" not in nodes) if "name" in plain else nodes.split()[1] == f"NodeAddr={expected}"
    unit = site.text("slurm", "slurmd.service.conf.j2", "gpu1")
    assert f"--conf-server {at('ctl1', 11, in_url)},{at('ctl2', 12, in_url)}\n" in unit
    assert f"--cluster.peer={at('db1', 13, in_url)}:9094" in site.text("alertmanager", "default.j2", "infra1")
    assert f"\nURL=https://{at('infra1', 15, in_url)}:" in site.text("journal", "upload.conf.j2", "gpu1")
    assert f" {at('ctl1', 11)}(rw," in site.text("storage", "exports.j2", "nas1")
    assert site.value("storage", "gpu1", "{{ storage_nfs_server }}") == at("nas1", 16)
    targets = site.value("prometheus", "infra1", "{{ groups['slurm_database'] | scrape_targets(hostvars, 9104, 'x') }}")
    assert targets[0]["address"] == f"{at('db1', 13, in_url)}:9104"
    assert site.value("prometheus", "infra1", "{{ ictx_registry }}") == f"{at('infra1', 15, in_url)}:5000"
    assert site.value("prometheus", "infra1", "{{ ictx_mlflow_uri }}") == f"https://{at('k3s1', 31, in_url)}:30500"
    assert at("gpu1", 21) in site.value("host_certificate", "gpu1", "{{ host_certificate_hosts }}")


@pytest.mark.parametrize(("address", "node_ip"), [("k3s2", None), ("fd00:10::32", "fd00:10::32")])
def test_k3s_gets_an_address_of_its_node_or_none(tmp_path: Path, address: str, node_ip: str | None) -> None:
    site = Site(inventory(tmp_path, IPV6 if node_ip else NAMES), tmp_path)
    variables = site.variables("k3s", "k3s2") | {"_k3s_runtime": {"stat": {"exists": False}}}
    config = Templar(site.cluster.loader, variables=variables).template(trusted("{{ _k3s_config }}"))
    assert config.get("node-ip") == node_ip
    assert config["server"] == ("https://k3s1:6443" if node_ip is None else "https://[fd00:10::31]:6443")
    assert address in config["tls-san"]


def test_the_dead_man_s_switch_receives_no_other_alert_wherever_it_stands(tmp_path: Path) -> None:
    site = Site(inventory(tmp_path, NAMES), tmp_path)
    receivers = [{"name": name, "webhook_url": "https://hooks.example.org/x"} for name in ("watchdog", "ops")]
    for order in (receivers, receivers[::-1]):
        variables = site.variables("alertmanager", "infra1") | {"alertmanager_receivers": order}
        text = site.cluster.render(ROOT / "roles/alertmanager/templates/alertmanager.yml.j2", variables)
        route = yaml.safe_load(text)["route"]
        assert route["receiver"] == "ops"
        assert [child["receiver"] for child in route["routes"]] == ["watchdog"]


@pytest.mark.parametrize(("variables", "user"), [("{}", "ictx"), ("registry_user: puller", "puller")])
def test_nodes_pull_as_the_user_that_the_registry_has(tmp_path: Path, variables: str, user: str) -> None:
    path = inventory(tmp_path, NAMES)
    (path / "group_vars/all/zz_test.yml").write_text(variables)
    site = Site(path, tmp_path)
    assert site.value("registry", "infra1", "{{ registry_user }}") == user
    assert [entry["user"] for entry in site.value("k3s", "k3s1", "{{ k3s_registries }}")] == [user]


def test_a_service_is_checked_at_the_address_on_which_it_listens() -> None:
    ini = (ROOT / "roles/grafana/templates/grafana.ini.j2").read_text()
    (http_addr,) = re.findall(r"^http_addr = (.*)$", ini, re.M)
    expression = "{{ grafana_listen | local_url_host }} " + http_addr
    for listen, url, address in [
        (":1", "localhost:1", ""),
        ("0.0.0.0:1", "localhost:1", "0.0.0.0"),
        ("127.0.0.1:1", "localhost:1", "127.0.0.1"),
        ("[::]:1", "localhost:1", "::"),
        ("192.0.2.5:1", "192.0.2.5:1", "192.0.2.5"),
        ("[fd00::5]:1", "[fd00::5]:1", "fd00::5"),
        ("web1:1", "web1:1", "web1"),
    ]:
        found = Templar(loader=None, variables={"grafana_listen": listen}).template(trusted(expression))
        assert found == f"{url} {address}"
    for file in ROOT.glob("roles/*/tasks/*.yml"):
        assert not re.search(r"localhost:\{\{ \w+_listen", file.read_text()), file


@pytest.mark.parametrize(("address", "listens"), [(NAMES, "0.0.0.0"), (IPV6, "::")], ids=["names", "ipv6"])
@pytest.mark.parametrize("playbook", ["mlflow", "serving", "judge"])
def test_pods_listen_on_the_addresses_of_their_nodes(tmp_path: Path, playbook: str, address: str, listens: str) -> None:
    """K3s on nodes with IPv6 addresses has no IPv4 network of pods."""
    image = json.dumps({"ref": "r:5000/a@sha256:0", "digest": f"sha256:{'0' * 64}"})
    for name in ("images/mlflow.json", "images/serving.json", "secrets/mlflow_user_serving", "secrets/serving_api_key"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(image)
    for name in ("ca.crt", *(f"issued/{name}.{end}" for name in ("mlflow", "serving") for end in ("crt", "key"))):
        (tmp_path / "ca" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ca" / name).write_text("x")
    extra = {"ictx_state_dir": str(tmp_path), "ictx_judge_values": {"model": {"name": "judge"}}}
    cluster = Cluster(inventory(tmp_path, address), extra)
    role, play, _ = next(
        use for use in cluster.uses(f"playbooks/{playbook}.yml") if use[0].get_name() == "helm_release"
    )
    found = {"json": {"model_version": {"version": "1"}}}
    variables = cluster.variables("localhost", play, role) | {"_serving_found": found, "_judge_found": found}
    variables |= {"_serving_further_found": {"results": []}}
    values = Templar(cluster.loader, variables=variables).template(trusted("{{ helm_release_values }}"))
    assert values["listenAddress"] == listens
