"""A site behind a proxy: every program uses it for external hosts, and connects directly to internal ones."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted
from programs import loaded

PROXY = {"http": "http://proxy.example.org:3128", "no_proxy": [".example.org", "198.51.100.0/24"]}
OUTSIDE = "mirror.invalid"  # a name that only the proxy resolves


@contextmanager
def serving(answer: Any) -> Iterator[tuple[int, list[str]]]:
    """Yields the port of a server on this machine, and its received requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


@pytest.fixture
def site() -> Iterator[dict[str, Any]]:
    """Yields a local mirror, a proxy that resolves an external name to it, and the received requests of each."""
    pages = {"/debian/./Packages": b"", "/simple/nothing/": b"<a href='nothing-1.0-py3-none-any.whl'>x</a>"}
    with serving(lambda path: (200, pages[path]) if path in pages else (404, b"")) as (inside, asked):

        def forward(url: str) -> tuple[int, bytes]:
            local = url.replace(f"//{OUTSIDE}/", f"//127.0.0.1:{inside}/")
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(local) as answer:
                    return 200, answer.read()
            except OSError:
                return 404, b""

        with serving(forward) as (port, through):
            yield {"proxy": f"http://127.0.0.1:{port}", "through": through, "inside": inside, "asked": asked}


def environment(proxy: dict[str, Any], **hosts: str) -> dict[str, str]:
    """Returns the proxy variables of a cluster with these hosts and addresses."""
    cluster = Cluster(ROOT / "inventories/lab", {"ictx_proxy": proxy})
    variables = {
        "ictx_proxy": proxy,
        "groups": {"all": [*hosts], "slurm_compute": []},
        "hostvars": {name: {"ansible_host": address} for name, address in hosts.items()},
    }
    text = "{{ ictx_proxy | proxy_environment(groups, hostvars) }}"
    return dict(Templar(cluster.loader, variables=variables).template(trusted(text)))


def test_apt_goes_out_through_the_proxy_and_stays_inside_without(site: dict[str, Any], tmp_path: Path) -> None:
    cluster = Cluster(ROOT / "inventories/lab")
    variables = {"common_proxy": environment({"http": site["proxy"]}, here="127.0.0.1"), "ansible_managed": "test"}
    config = tmp_path / "apt.conf"
    config.write_text(cluster.render(ROOT / "roles/common/templates/apt.conf.j2", variables))
    for folder in ("lists/partial", "cache/archives/partial", "etc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "status").touch()
    sources = [f"deb [trusted=yes] http://{host}/debian ./\n" for host in (OUTSIDE, f"127.0.0.1:{site['inside']}")]
    (tmp_path / "sources.list").write_text("".join(sources))
    options = {
        "Dir::Etc::sourcelist": tmp_path / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::parts": "-",
        "Dir::State::lists": tmp_path / "lists",
        "Dir::State::status": tmp_path / "status",
        "Dir::Cache": tmp_path / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    command = ["apt-get", "update", *(f"-o{name}={value}" for name, value in options.items())]
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        command, env={**clean, "APT_CONFIG": str(config)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"http://{OUTSIDE}/debian/./Packages" in site["through"]
    assert site["asked"].count("/debian/./Packages") == 2
    assert not [url for url in site["through"] if OUTSIDE not in url], "no internal host through the proxy"


def test_pip_goes_out_through_the_proxy_and_stays_inside_without(site: dict[str, Any]) -> None:
    variables = environment({"http": site["proxy"]}, here="127.0.0.1")
    for host in (OUTSIDE, f"127.0.0.1:{site['inside']}"):
        name = host.split(":")[0]
        command = [
            "-m",
            "pip",
            "download",
            "--isolated",
            "--no-cache-dir",
            "--retries=0",
            "--disable-pip-version-check",
        ]
        where = [f"--index-url=http://{host}/simple", f"--trusted-host={name}", "--no-deps", "nothing==1.0"]
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        subprocess.run([sys.executable, *command, *where], env={**clean, **variables}, capture_output=True, check=False)
    assert f"http://{OUTSIDE}/simple/nothing/" in site["through"]
    assert not [url for url in site["through"] if OUTSIDE not in url], "no internal host through the proxy"
    assert site["asked"].count("/simple/nothing/") == 2


def test_hosts_of_the_cluster_and_its_networks_are_reached_directly() -> None:
    found = environment(PROXY, n1="192.0.2.1", n2="fd00::2")
    assert found["http_proxy"] == found["HTTP_PROXY"] == "http://proxy.example.org:3128"
    assert "https_proxy" not in found
    direct = found["no_proxy"].split(",")
    assert {"localhost", "127.0.0.1", "n1", "192.0.2.1", "n2", "fd00::2", ".svc"} < set(direct)
    assert direct[-2:] == PROXY["no_proxy"]
    assert environment({}, n1="192.0.2.1") == {}


@pytest.mark.parametrize("host", ["[fd00::2]:5000", "[::1]:9090", "192.0.2.1:5000"])
def test_python_reaches_addresses_directly(host: str) -> None:
    found = environment(PROXY, n1="192.0.2.1", n2="fd00::2")
    assert urllib.request.proxy_bypass_environment(host, {"no": found["no_proxy"]})


def test_networks_of_ipv6_clusters_are_reached_directly() -> None:
    proxies = loaded(ROOT / "playbooks/plugins/filter/proxies.py")
    hosts = {"s1": {"ansible_host": "fd00::1", "k3s_api_address": "fd00::100"}}
    groups = {"all": ["s1"], "k3s_server": ["s1"]}
    direct = proxies.proxy_environment(PROXY, groups, hosts)["no_proxy"].split(",")
    assert {"fd42:42::/56", "fd42:43::/112", "fd00::1", "fd00::100", "[fd00::100]"} < set(direct)
    assert "10.42.0.0/16" not in direct


def given(role: str, host: str, cluster: Cluster, name: str, playbook: str) -> Any:
    """Returns a role's variable as its play passes it."""
    used, play = next((r, p) for r, p, _ in cluster.uses(playbook) if r.get_name() == role)
    variables = cluster.variables(host, play, used)
    return Templar(cluster.loader, variables=variables).template(trusted(f"{{{{ {name} }}}}"))


def test_every_program_that_goes_out_has_the_proxy() -> None:
    cluster = Cluster(ROOT / "inventories/example", {"ictx_proxy": PROXY, "ictx_state_dir": "/nonexistent"})
    whole = given("image_bake", "infra1", cluster, "image_bake_proxy", "playbooks/images.yml")
    direct = set(whole["no_proxy"].split(","))
    assert {"ctl1", "192.0.2.11", "gpu4", "192.0.2.24", "192.0.2.31", "10.42.0.0/16", "10.43.0.0/16"} < direct
    programs = {"container_engine": "images", "grafana": "monitoring"}
    for role, playbook in programs.items():
        assert given(role, "infra1", cluster, f"{role}_proxy", f"playbooks/{playbook}.yml") == whole, role
    for host in ("k3s1", "kgpu1"):
        assert given("k3s", host, cluster, "k3s_proxy", "playbooks/k3s.yml") == whole
    # The list has no single compute nodes, of which there can be many.
    apt = given("common", "gpu1", cluster, "common_proxy", "playbooks/common.yml")
    assert apt["http_proxy"] == PROXY["http"]
    assert "192.0.2.24" not in apt["no_proxy"]
    assert "192.0.2.15" in apt["no_proxy"]

    for unit in ("roles/container_engine/templates/proxy.conf.j2", "roles/k3s/templates/k3s.service.j2"):
        role = Path(unit).parts[1]
        used, play = next((r, p) for r, p, _ in cluster.uses("site.yml") if r.get_name() == role)
        host = "infra1" if role == "container_engine" else "k3s1"
        text = cluster.render(ROOT / unit, cluster.variables(host, play, used))
        assert 'Environment="HTTP_PROXY=http://proxy.example.org:3128"\n' in text
        assert f'Environment="NO_PROXY={whole["NO_PROXY"]}"\n' in text


def test_tasks_that_download_have_it_too() -> None:
    cluster = Cluster(ROOT / "inventories/example", {"ictx_proxy": PROXY})
    for playbook, name, host in (
        ("artifacts", "Manage external artifacts", "localhost"),
        ("gpu", "NVIDIA drivers and container toolkit", "gpu1"),
        ("images", "Images", "infra1"),
        ("k3s", "Choose the Kubernetes distribution", "k3s1"),
        ("k3s", "K3s servers, one by one", "k3s1"),
        ("k3s", "K3s agents", "kgpu1"),
        ("monitoring", "Prometheus", "infra1"),
        ("monitoring", "Grafana", "infra1"),
    ):
        (play,) = (play for play in cluster.plays(f"playbooks/{playbook}.yml") if play.name == name)
        found = Templar(cluster.loader, variables=cluster.variables(host, play)).template(play.environment)
        assert found["HTTP_PROXY"] == PROXY["http"], name


def test_a_build_has_it_and_the_image_does_not_keep_it() -> None:
    tasks = yaml.safe_load((ROOT / "roles/image_bake/tasks/build.yml").read_text())
    (build,) = (task for task in tasks if task["name"].startswith("Build "))
    cluster = Cluster(ROOT / "inventories/lab")
    for proxy in ({}, {"http_proxy": "http://p:1", "NO_PROXY": "a,b"}):
        variables = {"image_bake_proxy": proxy}
        text = build["vars"]["_image_bake_build_proxy"]
        arguments = Templar(cluster.loader, variables=variables).template(trusted(text))
        assert arguments == [f"--build-arg={name}={value}" for name, value in proxy.items()]
    for file in ROOT.glob("images/*/Dockerfile"):
        assert "proxy" not in file.read_text().lower(), "other build arguments remain in an image's history"


def test_lines_of_a_unit_are_what_systemd_reads() -> None:
    proxies = loaded(ROOT / "playbooks/plugins/filter/proxies.py")
    assert (
        proxies.environment_lines({"HTTP_PROXY": "http://p:1/a%20b"}) == 'Environment="HTTP_PROXY=http://p:1/a%%20b"\n'
    )
    assert proxies.environment_lines({}) == ""
