"""Every template of every role renders for both inventories, with the expected content."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleError
from ansible.playbook.play import Play
from ansible.playbook.role import Role
from cluster import ROOT, Cluster, trusted
from programs import program

# Variables that a role's tasks register before they write a template.
REGISTERED: dict[str, dict[str, Any]] = {
    "lab": {
        "_lab_host": {
            "quirks": {"cgroup_version": 1, "oci_runtime": "runc", "nofile": 524288},
            "containers": {"ictx-ctl": "running"},
        }
    },
    "k3s": {"_k3s_runtime": {"stat": {"exists": True}}},
    # Two loops: over registries, and over registries with what they mirror.
    "kube_lab": {"item": {"address": "192.0.2.15:5000", 0: {"address": "192.0.2.15:5000"}, 1: "docker.io"}},
    # Two loops: over targets of jobs, and over clusters.
    "prometheus": {
        "item": {
            "name": "node",
            "targets": [{"address": "192.0.2.1:9100", "labels": {"node": "n1"}}],
            "api_server": "https://192.0.2.31:6443",
            "namespaces": ["ictx"],
        }
    },
    "unit_dropins": {
        "item": "/etc/systemd/system/slurmd.service.d/zz-site.conf",
        "unit_dropins_units": {"slurmd.service": {"Service": {"LimitNOFILE": 1}}},
    },
    # The loop variable is a user name; this account exists in every inventory.
    "mlflow_users": {"item": "serving"},
    # One script per stage; test_job_scripts.py renders all of them.
    "slurm_jobs": {"item": trusted("{{ _slurm_jobs_stages | first }}")},
    "nvidia_driver": {
        "_nvidia_driver_pci": {
            "gpus": ["0000:07:00.0"],
            "kernel_modules": ["open"],
            "nvswitches": [],
            "nvlink5": False,
            "nouveau": False,
        }
    },
}
# Only the lab's inventory has containers as hosts.
PLAYBOOKS = {
    "lab": ["site.yml", "playbooks/artifacts.yml", "playbooks/lab.yml"],
    "example": ["site.yml", "playbooks/artifacts.yml"],
}
TEMPLATES = sorted(path.relative_to(ROOT) for path in ROOT.glob("roles/*/templates/**/*.j2"))


def render(cluster: Cluster, template: Path, variables: dict[str, Any]) -> str | AnsibleError:
    """Returns the text or the error, since one broken template must not hide others."""
    try:
        return cluster.render(template, variables)
    except AnsibleError as error:
        return error


class Texts(Mapping[str, Any]):
    """Maps a host to the text of a template in an inventory; renders it on access."""

    def __init__(self, cluster: Cluster, template: Path) -> None:
        self.cluster, self.template = cluster, template
        self.uses: dict[str, tuple[Role, Play]] = {}
        self.texts: dict[str, Any] = {}

    def __getitem__(self, host: str) -> Any:
        if host not in self.texts:
            role, play = self.uses[host]
            variables = {**self.cluster.variables(host, play, role), **REGISTERED.get(role.get_name(), {})}
            self.texts[host] = render(self.cluster, self.template, variables)
        return self.texts[host]

    def __iter__(self) -> Iterator[str]:
        return iter(self.uses)

    def __len__(self) -> int:
        return len(self.uses)

    def kinds(self) -> list[str]:
        """Returns one host of each kind: hosts in the same groups differ only in names and addresses."""
        found = {host: self.cluster.inventory.get_host(host) for host in reversed(self.uses)}
        return list({frozenset(map(str, about.get_groups())): host for host, about in found.items()}.values())


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Path, Texts]]:
    """Returns inventory → template → texts, for all templates of the playbooks' roles."""
    state = tmp_path_factory.mktemp("state")
    result: dict[str, dict[Path, Texts]] = {}
    for name, playbooks in PLAYBOOKS.items():
        cluster = Cluster(ROOT / "inventories" / name, {"lab_state_dir": str(state), "ictx_state_dir": str(state)})
        texts = result.setdefault(name, {})
        for playbook in playbooks:
            for role, play, hosts in cluster.uses(playbook):
                for template in sorted(Path(role._role_path, "templates").glob("**/*.j2")) if hosts else []:
                    found = texts.setdefault(template.relative_to(ROOT), Texts(cluster, template))
                    found.uses |= dict.fromkeys(hosts, (role, play))
    return result


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_a_template_renders_for_every_inventory_that_has_its_role(rendered: Any, template: Path) -> None:
    inventories = [name for name, texts in rendered.items() if template in texts]
    assert inventories == (["lab"] if template.parts[1] == "lab" else ["lab", "example"])
    for name in inventories:
        for host in rendered[name][template].kinds():
            text = rendered[name][template][host]
            assert not isinstance(text, AnsibleError), f"{template} for {host}: {text}"
            assert text.strip(), f"{template} is empty for {host}"
            assert "{{" not in text, f"{template} leaves an expression for {host}"
            assert "{%" not in text, f"{template} leaves a statement for {host}"


@pytest.fixture(scope="session")
def written(rendered: Any) -> Any:
    """Returns a function: inventory, role, template, host → lines."""

    @cache
    def lines(inventory: str, role: str, template: str, host: str) -> list[str]:
        return rendered[inventory][Path("roles", role, "templates", template)][host].splitlines()

    return lines


def test_slurm_conf_names_both_controllers_the_primary_first(written: Any) -> None:
    conf = written("example", "slurm", "slurm.conf.j2", "ctl1")
    assert [line for line in conf if line.startswith("SlurmctldHost=")] == [
        "SlurmctldHost=ctl1(192.0.2.11)",
        "SlurmctldHost=ctl2(192.0.2.12)",
    ]
    assert "StateSaveLocation=/shared/slurm/state" in conf
    assert "ClusterName=example" in conf
    assert "AccountingStorageHost=db1" in conf


def test_slurm_conf_describes_the_compute_nodes_as_slurmd_does(written: Any) -> None:
    conf = written("example", "slurm", "slurm.conf.j2", "ctl1")
    nodes = [line for line in conf if line.startswith("NodeName=")]
    assert nodes == [
        "NodeName=gpu[1-4] NodeAddr=192.0.2.[21-24] Sockets=2 CoresPerSocket=32 ThreadsPerCore=2 "
        f"RealMemory={515842 - 16384} Gres=gpu:a100:4 State=UNKNOWN"
    ]
    assert "GresTypes=gpu" in conf
    assert "AccountingStorageTRES=gres/gpu" in conf


@cache
def slurm_variables() -> tuple[Cluster, dict[str, Any]]:
    """Returns the example inventory, and the variables of the role slurm on its controller."""
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": "/nonexistent"})
    role, play, _ = next(use for use in cluster.uses("playbooks/slurm.yml") if use[0].get_name() == "slurm")
    return cluster, cluster.variables("ctl1", play, role)


def conf_of(template: str = "slurm.conf", version: str = "24.11.5-1", **variables: Any) -> list[str]:
    """Returns the lines of a SLURM configuration file for the example with other variables."""
    cluster, known = slurm_variables()
    known = {**known, **variables, "_slurm_package": {"stdout": version}}
    return cluster.render(ROOT / f"roles/slurm/templates/{template}.j2", known).splitlines()


def test_preempted_jobs_get_a_signal_and_time(written: Any) -> None:
    conf = written("example", "slurm", "slurm.conf.j2", "ctl1")
    assert {"PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "PriorityWeightQOS=5000"} <= set(conf)
    # Without this, a job with a signal of its own gets no signal when it is preempted.
    assert "SlurmctldParameters=enable_configless,preempt_send_user_signal" in conf
    partitions = {line.split()[0]: line.split() for line in conf if line.startswith("PartitionName=")}
    assert {"PreemptMode=REQUEUE", "GraceTime=120"} <= set(partitions["PartitionName=batch"])
    assert "PreemptMode=OFF" in partitions["PartitionName=urgent"]


def test_preemption_and_priority_follow_their_variables() -> None:
    partition = {"name": "A", "allow_qos": ["HIGH"], "allow_accounts": ["Optics"], "grace_seconds": 7}
    conf = conf_of(
        slurm_preempt_type="qos",
        slurm_preempt_mode="CANCEL",
        slurm_priority_weights={"age": 5, "partition": 3},
        slurm_partitions=[partition],
    )
    assert {"PreemptType=preempt/qos", "PreemptMode=CANCEL", "PriorityWeightAge=5", "PriorityWeightPartition=3"} <= {
        *conf
    }
    assert "PriorityWeightFairshare=10000" in conf
    (line,) = (line for line in conf if line.startswith("PartitionName="))
    assert {"AllowQos=high", "AllowAccounts=optics", "GraceTime=7", "PreemptMode=CANCEL"} <= set(line.split())
    conf = conf_of(slurm_preempt_type="none")
    assert "PreemptMode=OFF" in conf
    assert all("PreemptMode=OFF" in line for line in conf if line.startswith("PartitionName="))


@pytest.mark.parametrize(("version", "there"), [("24.11.5-1", False), ("25.11.1-1", True), ("26.05.3-1", True)])
def test_slurm_s_own_metrics_are_served_where_the_release_has_them(version: str, there: bool) -> None:
    assert ("MetricsType=metrics/openmetrics" in conf_of(version=version, slurm_native_metrics=True)) == there
    assert not [line for line in conf_of(version=version) if line.startswith("Metrics")]


def test_a_topology_is_switches_or_blocks() -> None:
    switches = [{"name": "leaf1", "nodes": "gpu[1-2]"}, {"name": "leaf2", "nodes": ["gpu3", "gpu4"]}]
    spine = {"name": "spine", "switches": ["leaf1", "leaf2"]}
    assert "TopologyPlugin=topology/tree" in conf_of(slurm_topology=switches)
    assert conf_of("topology.conf", slurm_topology=[*switches, spine])[1:] == [
        "SwitchName=leaf1 Nodes=gpu[1-2]",
        "SwitchName=leaf2 Nodes=gpu3,gpu4",
        "SwitchName=spine Switches=leaf1,leaf2",
    ]
    assert conf_of("topology.conf", slurm_topology=switches[:1], slurm_topology_type="block")[1:] == [
        "BlockName=leaf1 Nodes=gpu[1-2]"
    ]
    assert not [line for line in conf_of() if line.startswith("Topology")]


def test_every_controller_and_login_node_writes_the_same_slurm_conf(rendered: Any) -> None:
    texts = rendered["example"][Path("roles/slurm/templates/slurm.conf.j2")]
    assert {texts[host] for host in ("ctl1", "ctl2", "login1")} == {texts["ctl1"]}


def test_gres_conf_names_the_device_files(written: Any) -> None:
    gres = written("example", "slurm", "gres.conf.j2", "ctl2")
    expected = ["NodeName=gpu[1-4] Name=gpu Type=a100 File=/dev/nvidia[0-3]"]
    assert [line for line in gres if line.startswith("NodeName=")] == expected


def test_jobs_run_in_the_runtime_that_hands_out_gpus(written: Any) -> None:
    # Compute nodes get the controller's file, so the controller's variable has the effect.
    run = next(line for line in written("example", "slurm", "oci.conf.j2", "ctl1") if line.startswith("RunTimeRun="))
    assert "nvidia-container-runtime --rootless=true" in run
    run = next(line for line in written("lab", "slurm", "oci.conf.j2", "ctl") if line.startswith("RunTimeRun="))
    assert "runc --rootless=true" in run


def test_slurmd_asks_every_controller_for_its_configuration(written: Any) -> None:
    assert any(
        line.endswith("--conf-server 192.0.2.11,192.0.2.12")
        for line in written("example", "slurm", "slurmd.service.conf.j2", "gpu3")
    )


def test_the_lab_advertises_no_gpu_unless_asked(written: Any) -> None:
    conf = written("lab", "slurm", "slurm.conf.j2", "ctl")
    assert not [line for line in conf if "gres" in line.lower()]
    assert "ProctrackType=proctrack/linuxproc" in conf


@pytest.mark.attack(
    "M6",
    "root of a host that mounts the shared directory writes there as root",
    before="root of any host in the exported network was root on the storage (no_root_squash)",
    now="root is squashed, except for the hosts that create folders and images",
)
def test_root_of_a_client_is_root_on_the_export_only_where_it_must_be(written: Any) -> None:
    exports = written("example", "storage", "exports.j2", "nas1")
    options = dict(re.findall(r"^/srv/ictx (\S+?)\((\S+)\)$", "\n".join(exports), re.MULTILINE))
    assert {host: "no_root_squash" in words.split(",") for host, words in options.items()} == {
        # Two controllers, the accounting database, the image builder, and the network.
        "192.0.2.11": True, "192.0.2.12": True, "192.0.2.13": True, "192.0.2.15": True, "192.0.2.0/24": False
    }  # fmt: skip
    for words in options.values():
        assert "sync" in words.split(",")
        assert "async" not in words.split(",")


@pytest.mark.attack(
    "C1",
    "a hook in a container's state, which the runtime reads for slurmstepd",
    before="the runtime ran as root",
    now="all commands run as the user, through runuser or (RunTimeRun) by SLURM",
)
@pytest.mark.parametrize(("inventory", "host"), [("example", "ctl1"), ("lab", "ctl")])
def test_the_runtime_never_runs_as_root(written: Any, inventory: str, host: str) -> None:
    conf = written(inventory, "slurm", "oci.conf.j2", host)
    commands = dict(re.findall(r'^(RunTime\w+)="(\S+ \S+)', "\n".join(conf), re.MULTILINE))
    as_user = "/opt/ictx/bin/ictx-oci-as-user '%u'"
    assert commands.pop("RunTimeRun") == "/opt/ictx/bin/ictx-oci-run '%b'"
    run = next(line for line in conf if line.startswith("RunTimeRun="))
    assert re.search(r"ictx-oci-run '%b' '%r' (runc|nvidia-container-runtime) --", run)
    assert commands == dict.fromkeys(("RunTimeQuery", "RunTimeKill", "RunTimeDelete"), as_user)
    # No command of root's shell contains values from a user's bundle.
    assert not [line for line in conf if re.match("RunTime(Query|Kill|Delete)=", line) and re.search("%[bre@]", line)]


def test_what_slurmstepd_writes_for_a_user_lies_where_no_link_is_followed(written: Any) -> None:
    (path,) = (line for line in written("example", "slurm", "oci.conf.j2", "ctl1") if line.startswith("ContainerPath="))
    assert path == "ContainerPath=/run/ictx-oci/.steps/%j.%s"
    tasks = yaml.safe_load((ROOT / "roles/slurm/tasks/prepare.yml").read_text())
    (mount,) = (task["ansible.posix.mount"] for task in tasks if "ansible.posix.mount" in task)
    assert {"nosymfollow", "nosuid", "nodev"} <= set(mount["opts"].split(","))
    unit = written("example", "slurm", "slurmd.service.conf.j2", "gpu1")
    assert "AssertPathIsMountPoint=/run/ictx-oci" in unit


@pytest.mark.attack(
    "M7",
    "users see and preempt one another's jobs, and share /tmp and /dev/shm",
    before="all of it was allowed",
    now="PrivateData, a QOS for the partition, an epilog, and a private /tmp for each job",
)
def test_users_of_slurm_are_kept_apart(written: Any) -> None:
    conf = written("example", "slurm", "slurm.conf.j2", "ctl1")
    settings = dict(line.split("=", 1) for line in conf if re.match(r"\w+=", line))
    assert {"jobs", "usage", "users"} <= set(settings["PrivateData"].split(","))
    assert {"associations", "limits", "qos"} <= set(settings["AccountingStorageEnforce"].split(","))
    assert settings["Epilog"] == "/etc/slurm/epilog.d/*"
    assert (settings["PrologFlags"], settings["JobContainerType"]) == ("Contain", "job_container/tmpfs")
    (urgent,) = (line for line in conf if line.startswith("PartitionName=urgent"))
    assert "AllowQos=urgent" in urgent.split()


def test_the_lab_cannot_track_processes_and_so_shares_tmp(written: Any) -> None:
    conf = written("lab", "slurm", "slurm.conf.j2", "ctl")
    assert "JobContainerType=job_container/none" in conf
    assert "PrologFlags=Alloc" in conf


def test_the_driver_stays_on_the_branch_of_the_inventory(written: Any) -> None:
    assert "Pin: version 580.*" in written("example", "nvidia_driver", "preferences.j2", "gpu1")


def test_the_registry_serves_on_its_port_with_tls(rendered: Any) -> None:
    for texts in rendered.values():
        for text in texts[Path("roles/registry/templates/config.yml.j2")].values():
            http = yaml.safe_load(text)["http"]
            assert http["addr"] == ":5000"
            assert http["tls"]["certificate"].endswith(".crt")


def test_prometheus_scrapes_every_host_of_the_inventory_by_its_name(written: Any) -> None:
    conf = yaml.safe_load("\n".join(written("example", "prometheus", "prometheus.yml.j2", "infra1")))
    jobs = {job["job_name"]: job for job in conf["scrape_configs"]}
    asked = {"endpoints", "mlflow-endpoints"}
    assert set(jobs) == {"node", "mysqld", "dcgm", "blackbox", "prometheus", "alertmanager", *asked}
    assert {job["scheme"] for job in jobs.values()} == {"https"}
    assert jobs["node"]["honor_labels"] is True, "a controller exposes metrics with other nodes' labels"
    own = {"username": "prometheus", "password_file": "/etc/prometheus/own_password"}
    for name, job in jobs.items():
        exporter = {"username": "metrics", "password_file": "/etc/prometheus/metrics_password"}
        assert job["basic_auth"] == (own if name in ("prometheus", "alertmanager") else exporter)
    assert conf["alerting"]["alertmanagers"][0]["basic_auth"] == own
    assert "insecure" not in str(conf), "certificates must be verified"
    assert conf["alerting"]["alertmanagers"][0]["static_configs"] == [{"targets": ["192.0.2.15:9093"]}]


def test_prometheus_scrapes_kubernetes_with_the_token_that_its_play_keeps(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/kubernetes_metrics_token").write_text("token")
    kubeconfig = {"clusters": [{"cluster": {"server": "https://192.0.2.31:6443"}}]}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": str(tmp_path)})
    role, play = next((r, p) for r, p, _ in cluster.uses("site.yml") if r.get_name() == "prometheus")
    template = ROOT / "roles/prometheus/templates/prometheus.yml.j2"
    conf = yaml.safe_load(cluster.render(template, cluster.variables("infra1", play, role)))
    jobs = {job["job_name"]: job for job in conf["scrape_configs"] if job["job_name"].startswith("kubernetes-")}
    kinds = ("nodes", "cadvisor", "apiserver", "pods", "services", "state")
    assert set(jobs) == {f"kubernetes-example-{kind}" for kind in kinds}
    for name, job in jobs.items():
        assert job["scheme"] == "https"
        assert job["tls_config"] == {"ca_file": "/etc/prometheus/kubernetes/example.crt"}, "TLS must be verified"
        assert job["authorization"] == {"credentials_file": "/etc/prometheus/kubernetes/example.token"}
        assert job["file_sd_configs"] == [{"files": [f"/var/lib/prometheus/kubernetes/{name}.json"]}]


def test_native_scrape_configs_are_taken_over_as_they_are_and_validated(tmp_path: Path) -> None:
    job = {
        "job_name": "switches: all",
        "honor_timestamps": False,
        "authorization": {"credentials_file": str(tmp_path / "token")},
        "params": {"match[]": ['{job="node"}', "up"]},
        "metric_relabel_configs": [
            {"source_labels": ["__name__"], "regex": "(.*)_{{x}}", "target_label": "x", "replacement": "${1}"}
        ],
        "static_configs": [{"targets": ["192.0.2.1:9100"], "labels": {"zone": "1"}}],
    }
    tasks = yaml.safe_load((ROOT / "roles/prometheus/tasks/configure.yml").read_text())
    (task,) = (task for task in tasks if task["name"] == "Configure Prometheus")
    _, validate = task["ansible.builtin.template"]["validate"].split("{{ _prometheus_promtool }} ")
    (tmp_path / "token").touch()
    for extra, status in (([job, job], 1), ([{**job, "relabel_config": []}], 1), ([job], 0)):
        given = {"ictx_state_dir": str(tmp_path), "prometheus_tls_dir": str(tmp_path)}
        cluster = Cluster(ROOT / "inventories/example", {**given, "prometheus_extra_scrape_configs": extra})
        role, play = next((r, p) for r, p, _ in cluster.uses("site.yml") if r.get_name() == "prometheus")
        template = ROOT / "roles/prometheus/templates/prometheus.yml.j2"
        file = tmp_path / "prometheus.yml"
        file.write_text(cluster.render(template, cluster.variables("infra1", play, role)))
        assert yaml.safe_load(file.read_text())["scrape_configs"][-len(extra) :] == extra
        command = [program("promtool"), *(validate % file).split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
    (tmp_path / "token").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, "the CA file does not exist"


def test_a_single_alertmanager_does_not_look_for_others(written: Any) -> None:
    (arguments,) = (line for line in written("lab", "alertmanager", "default.j2", "svc1") if line.startswith("ARGS="))
    assert arguments.endswith('--cluster.listen-address="')


@pytest.mark.parametrize(("peer", "address"), [("192.0.2.22:9094", "0.0.0.0"), ("[2001:db8::22]:9094", "[::]")])
def test_several_alertmanagers_bind_to_an_address_that_gossip_over_tls_needs(peer: str, address: str) -> None:
    cluster = Cluster(ROOT / "inventories/example")
    role, play = next((r, p) for r, p, _ in cluster.uses("site.yml") if r.get_name() == "alertmanager")
    template = ROOT / "roles/alertmanager/templates/default.j2"
    variables = cluster.variables("infra1", play, role) | {"alertmanager_peers": [peer]}
    assert f" --cluster.listen-address={address}:9094 " in cluster.render(template, variables)


def test_several_alertmanagers_gossip_with_certificates_only(written: Any) -> None:
    conf = yaml.safe_load("\n".join(written("example", "alertmanager", "cluster.yml.j2", "infra1")))
    assert conf["tls_server_config"]["client_auth_type"] == "RequireAndVerifyClientCert"
    files = {"cert_file": "host.crt", "key_file": "host.key", "ca_file": "ca.crt"}
    assert conf["tls_client_config"] == {name: f"/etc/ictx/tls/{file}" for name, file in files.items()}


def test_no_password_stands_in_a_configuration_of_monitoring(rendered: Any) -> None:
    texts = rendered["example"]
    for role in ("prometheus", "alertmanager", "grafana", "node_exporter"):
        for template, hosts in texts.items():
            if template.parts[1] == role:
                for text in hosts.values():
                    found = re.findall(r"^\s*(?:basicAuth)?password: (?!\$__file)", text, re.IGNORECASE | re.MULTILINE)
                    assert found == [], template
