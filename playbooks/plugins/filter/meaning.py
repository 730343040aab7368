"""Ansible filter: what an inventory's values mean together, where each of them alone has the right form."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ansible.plugins.loader import filter_loader

Problem = tuple[str, str, str]
"""The variable or group, what is wrong and what to do, and the host (empty: the whole cluster)."""

SYSTEM_FOLDERS = re.compile(r"/|/(bin|boot|dev|etc|lib|lib64|root|run|sbin|sys|tmp|usr|var|var/lib|var/tmp)")
# What a mount there would hide, or jobs do not see.
HIDDEN_FOLDERS = re.compile(r"/(boot|dev|etc|root|run|sys|tmp)/.*|/home|/opt(/ictx(/.*)?)?")
K3S_NETWORKS = {"cluster-cidr": "10.42.0.0/16", "service-cidr": "10.43.0.0/16"}  # its defaults
LAB_NETWORKS = {"kube_lab_pod_network": "10.244.0.0/24", "kube_lab_service_network": "10.96.0.0/24"}  # the role's
NODE_PORTS = range(30000, 32768)


class Inventory:
    """Groups, and what their hosts' variables are; a variable that only facts complete is unknown, which is None."""

    def __init__(self, values: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> None:
        self.groups, self._values = groups, values

    def hosts(self, group: str) -> list[str]:
        """Returns a group's hosts."""
        return list(self.groups.get(group, ()))

    def of(self, host: str, name: str, default: Any = None) -> Any:
        """Returns a host's variable."""
        return self._values.get(host, {}).get(name, default)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a variable of the whole cluster: that of the first host which has it."""
        return next((values[name] for values in self._values.values() if values.get(name) is not None), default)

    def address(self, host: str) -> str:
        """Returns where other hosts reach a host."""
        return str(self.of(host, "ictx_address") or self.of(host, "ansible_host", host))

    def hardware(self, host: str) -> dict[str, dict[str, Any]]:
        """Returns what a compute node is declared to have, by the variable that has it."""
        by_group, by_measure = self._described
        declared = filter_loader.get("declared_hardware").j2_function
        own = {name: self.of(host, name) for name in ("slurm_gres", "slurm_real_memory_mb")}
        return dict(declared(own, by_group.get(host, {}), by_measure.get(host, {})))

    def gres(self, host: str) -> list[Mapping[str, Any]]:
        """Returns a node's generic resources: those of its group, its own, or those that were measured."""
        by_group, by_measure = self._described
        own = self.of(host, "slurm_gres") or by_measure.get(host, {}).get("gres") or []
        return list(by_group.get(host, {}).get("gres", own))

    @cached_property
    def _described(self) -> tuple[Mapping[str, Any], ...]:
        described = filter_loader.get("node_hardware").j2_function
        return tuple(described(self.get(f"slurm_{name}", [])) for name in ("node_groups", "measured_nodes"))


def nodes(text: str) -> list[str]:
    """Returns the names in a hostlist. Raises ValueError for one that is none."""
    return list(filter_loader.get("expand_nodes").j2_function(text))


def minutes(text: str) -> float:
    """Returns a time limit as SLURM reads it, in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, seconds = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + mins + seconds / 60
    hours, mins, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return hours * 60 + mins + seconds / 60


def close(word: str, known: Sequence[str]) -> str:
    """Returns a hint at the nearest known word, empty when none is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(names: Sequence[str]) -> str:
    """Returns the first few of the names."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def partition_nodes(partition: Mapping[str, Any], compute: list[str]) -> list[str]:
    """Returns a partition's nodes. Raises ValueError for what is no list of nodes."""
    given = partition.get("nodes", "ALL")
    parts = [given] if isinstance(given, str) else [str(part) for part in given]
    return [name for part in parts for name in (compute if part.upper() == "ALL" else nodes(part))]


def partitions(site: Inventory) -> Iterator[Problem]:
    """Partitions have nodes that exist; one is the default; their QOS exist."""
    compute, known = site.hosts("slurm_compute"), {qos["name"].lower() for qos in kept(site, "slurm_qos")}
    given = site.get("slurm_partitions", [])
    for partition in given:
        name = partition["name"]
        try:
            found = partition_nodes(partition, compute)
        except ValueError as error:
            yield "slurm_partitions", f"{name}: {error}", ""
            continue
        if not found and compute:
            yield "slurm_partitions", f"{name} has no nodes: list some, or write nodes: ALL", ""
        for node in dict.fromkeys(found):
            if node not in compute:
                hint = close(node, compute)
                yield "slurm_partitions", f"{name} has the node {node}, which is not in slurm_compute{hint}", ""
        for node, count in Counter(found).items():
            if count > 1:
                yield "slurm_partitions", f"{name} has the node {node} {count} times", ""
        for qos in partition.get("allow_qos", []) if known else []:
            if qos.lower() not in known:
                hint = close(qos, [*known])
                yield "slurm_partitions", f"{name} allows the QOS {qos}, which is not in slurm_qos{hint}", ""
    defaults = [partition["name"] for partition in given if partition.get("default") in (True, "true", "yes")]
    if len(defaults) > 1:
        yield "slurm_partitions", f"{' and '.join(defaults)} are both the default: let one be", ""


def jobs(site: Inventory) -> Iterator[Problem]:
    """The platform's own jobs fit the partitions that they go to."""
    known = {partition["name"]: partition for partition in site.get("slurm_partitions", [])}
    if not known:
        return
    common = {
        name: site.get(f"slurm_jobs_{name}")
        for name in ("partition", "nodes", "gpus_per_node", "cpus_per_node", "time", "grace_seconds")
    }
    yield from _job(site, "slurm_jobs_", common, known)
    for stage, about in site.get("slurm_jobs_stages", {}).items():
        own = {name: about[name] for name in common if name in about}
        # What does not train is on one node, as filter/stages.py has it.
        single = {} if about.get("kind", stage) in ("pretrain", "extend", "sft", "dpo") else {"nodes": 1}
        if own:
            yield from _job(site, f"slurm_jobs_stages: {stage}: ", common | single | own, known)


def _job(site: Inventory, where: str, job: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Problem]:
    name = str(job["partition"] or next(iter(known)))
    if name not in known:
        yield f"{where}partition", f"there is no partition {name} in slurm_partitions, only {one_of([*known])}", ""
        return
    compute, limit = site.hosts("slurm_compute"), known[name].get("max_time", "UNLIMITED")
    try:
        hosts = [node for node in partition_nodes(known[name], compute) if node in compute]
    except ValueError:
        return
    if isinstance(job["time"], str) and isinstance(limit, str) and minutes(job["time"]) > minutes(limit):
        text = f"{job['time']} is more than the partition {name} allows ({limit}): jobs would never start"
        yield f"{where}time", text, ""
    grace = int(job["grace_seconds"] or 0)
    if isinstance(job["time"], str) and grace >= minutes(job["time"]) * 60:
        yield f"{where}grace_seconds", f"{grace} is not less than slurm_jobs_time ({job['time']})", ""
    wanted, gpus = int(job["nodes"] or 1), int(job["gpus_per_node"] or 0)
    if wanted > len(hosts):
        yield f"{where}nodes", f"{wanted} nodes, but the partition {name} has {len(hosts)}: jobs would never start", ""
    elif gpus and sum(_gpus(site, host) >= gpus for host in hosts) < wanted:
        most = max((_gpus(site, host) for host in hosts), default=0)
        yield (
            f"{where}gpus_per_node",
            f"{gpus} GPUs on each of {wanted} nodes, but slurm_gres of the partition {name} has at most {most} a node",
            "",
        )
    cpus = int(job["cpus_per_node"] or 1)
    have = [_cpus(site, host) for host in hosts]
    if all(have) and wanted <= len(hosts) and sum(number >= cpus for number in have) < wanted:
        text = f"{cpus} CPUs on each of {wanted} nodes, but the partition {name} has at most {max(have)} a node"
        yield f"{where}cpus_per_node", f"{text}: jobs would never start", ""


def _cpus(site: Inventory, host: str) -> int:
    """Returns how many CPUs a node is declared to have; 0 where nothing declares it."""
    for layer in site.hardware(host).values():
        if "cpus" in layer:
            return int(layer["cpus"])
        if "sockets" in layer:
            return int(layer["sockets"]) * int(layer["cores_per_socket"]) * int(layer["threads_per_core"])
    return 0


def _gpus(site: Inventory, host: str) -> int:
    return sum(int(gres["count"]) for gres in site.gres(host) if gres["name"] == "gpu")


def kept(site: Inventory, name: str) -> list[Mapping[str, Any]]:
    """Returns a list's entries without those that are to be removed."""
    return [entry for entry in site.get(name, []) if entry.get("state") != "absent"]


def accounts(site: Inventory) -> Iterator[Problem]:
    """What QOS, accounts, associations and partitions name exists, once; SLURM keeps names in small letters."""
    users = [user["name"] for user in site.get("ictx_users", []) if user.get("state", "present") == "present"]
    qos = [entry["name"].lower() for entry in kept(site, "slurm_qos")]
    everybody = str(site.get("slurm_account", "ictx")).lower()
    named = [everybody, *(entry["name"].lower() for entry in kept(site, "slurm_accounts"))]

    def unknown(where: str, what: str, names: Iterable[str], known: list[str], source: str = "") -> Iterator[Problem]:
        for name in names:
            if name not in known:
                text = "who is not one of ictx_users" if known is users else f"which is not in {source}"
                yield where, f"{what} {name}, {text}{close(name, known)}", ""

    for entry in kept(site, "slurm_qos"):
        yield from unknown("slurm_qos", f"{entry['name']} is for", entry.get("users", []), users)
        others = [name.lower() for name in entry.get("preempt", [])]
        yield from unknown("slurm_qos", f"{entry['name']} preempts", others, qos, "slurm_qos")
        if others and site.get("slurm_preempt_type") != "qos":
            yield "slurm_qos", f"{entry['name']} has preempt, which counts with slurm_preempt_type: qos only", ""
    for entry in kept(site, "slurm_accounts"):
        parents = [str(entry.get("parent", "root")).lower()]
        yield from unknown("slurm_accounts", f"{entry['name']} is below", parents, ["root", *named], "slurm_accounts")
    for entry in kept(site, "slurm_associations"):
        yield from unknown("slurm_associations", "one is of", [entry["user"]], users)
        account = [entry["account"].lower()]
        yield from unknown("slurm_associations", f"{entry['user']} is in", account, named, "slurm_accounts")
    for name in ("slurm_accounts", "slurm_associations"):
        for entry in kept(site, name) if qos else []:
            wanted = [one.lower() for one in [*entry.get("qos", []), *filter(None, [entry.get("default_qos")])]]
            who = f"{entry.get('user', '')} {entry.get('name') or entry.get('account')}".strip()
            yield from unknown(name, f"{who} has the QOS", wanted, qos, "slurm_qos")
    for partition in site.get("slurm_partitions", []):
        allowed = [name.lower() for name in partition.get("allow_accounts", [])]
        yield from unknown(
            "slurm_partitions", f"{partition['name']} allows the account", allowed, named, "slurm_accounts"
        )
    names = [(name, entry["name"].lower()) for name in ("slurm_qos", "slurm_accounts") for entry in site.get(name, [])]
    names += [
        ("slurm_associations", f"{entry['user']} in {entry['account'].lower()}")
        for entry in site.get("slurm_associations", [])
    ]
    for (where, name), count in Counter(names).items():
        if count > 1:
            yield where, f"{count} items have the name {name}", ""
    for user, count in Counter(e["user"] for e in kept(site, "slurm_associations") if e.get("default")).items():
        if count > 1:
            yield "slurm_associations", f"{user} has {count} default accounts: let one be", ""
    yield from _ancestors(
        {e["name"].lower(): str(e.get("parent", "root")).lower() for e in kept(site, "slurm_accounts")}
    )


def _ancestors(parents: Mapping[str, str]) -> Iterator[Problem]:
    for name in parents:
        above, seen = parents[name], {name}
        while above in parents and above not in seen:
            seen.add(above)
            above = parents[above]
        if above == name:
            yield "slurm_accounts", f"{name} is below itself", ""


def node_groups(site: Inventory) -> Iterator[Problem]:
    """Groups have nodes that exist, each node is in one group, and what is declared is enough and adds up."""
    compute, seen = site.hosts("slurm_compute"), {}
    for name, count in Counter(str(group["name"]).lower() for group in site.get("slurm_node_groups", [])).items():
        if count > 1:
            yield "slurm_node_groups", f"{count} groups are named {name}, whatever their capitals: rename one", ""
    for group in site.get("slurm_node_groups", []):
        name = group["name"]
        try:
            listed = partition_nodes(group, compute)
        except ValueError as error:
            yield "slurm_node_groups", f"{name}: {error}", ""
            continue
        for node in dict.fromkeys(listed):
            if node not in compute:
                hint = close(node, compute)
                yield "slurm_node_groups", f"{name} has the node {node}, which is not in slurm_compute{hint}", ""
            if node in seen:
                yield "slurm_node_groups", f"{node} is in {seen[node]} and in {name}: take it out of one", ""
            seen.setdefault(node, name)
        shape = [key for key in ("sockets", "cores_per_socket", "threads_per_core") if key in group]
        if shape and (len(shape) < 3 or "cpus" in group):
            text = f"{name} needs sockets, cores_per_socket and threads_per_core, or cpus alone"
            yield "slurm_node_groups", text, ""
        yield from _gres_problems("slurm_node_groups", f"{name}: ", group.get("gres", []), "")


def _gres_problems(where: str, prefix: str, given: Sequence[Mapping[str, Any]], host: str) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for (name, kind), count in Counter((gres["name"], gres.get("type")) for gres in given).items():
        if count > 1:
            yield where, f"{prefix}{count} items are {name}:{kind}: add their counts up", host
    for gres in given:
        try:
            devices = nodes(gres["file"]) if gres.get("file") else []
        except ValueError as error:
            yield where, f"{prefix}{error}", host
            continue
        what, several = f"{gres['name']}:{gres.get('type')}", gres.get("devices") or []
        if devices and several:
            yield where, f"{prefix}{what} has file and devices: leave one", host
        elif several and len(several) != int(gres["count"]):
            text = f"{prefix}{what} has the count {gres['count']}, but its devices are {len(several)}"
            yield where, text, host
        if devices and len(devices) != int(gres["count"]):
            text = f"{prefix}{what} has the count {gres['count']}, but {gres['file']} are {len(devices)} devices"
            yield where, text, host
        for device in devices:
            if device in seen:
                yield where, f"{prefix}{what} and {seen[device]} both have {device}: take it out of one", host
            seen.setdefault(device, what)


def resources(site: Inventory) -> Iterator[Problem]:
    """Devices of a node are as many as it offers; it has memory left."""
    for host in site.hosts("slurm_compute"):
        yield from _gres_problems("slurm_gres", "", site.of(host, "slurm_gres", []) or [], host)
        real, reserved = (int(site.of(host, f"slurm_{kind}_memory_mb") or 0) for kind in ("real", "reserved"))
        if real and reserved >= real:
            yield "slurm_reserved_memory_mb", f"{reserved} leaves nothing of slurm_real_memory_mb ({real})", host
        if _gpus(site, host) and host in {*site.hosts("k3s_agent"), *site.hosts("k3s_server")}:
            text = "has GPUs for jobs (slurm_gres) and is a node of Kubernetes: two schedulers would allocate the same"
            yield f"host {host}", text, ""


def mig(site: Inventory) -> Iterator[Problem]:
    """SLURM hands out the devices of a GPU that MIG divides, as many as there are, and never the GPU itself."""
    for host in site.hosts("slurm_compute"):
        divided = [entry for entry in site.of(host, "nvidia_driver_mig") or [] if entry.get("profiles")]
        every = any(not entry.get("gpus") for entry in divided)
        cards = {int(number) for entry in divided for number in entry.get("gpus") or []}
        made = Counter(each for entry in divided for each in entry["profiles"] for _ in entry.get("gpus") or [0])
        for gres in site.gres(host) if divided else []:
            what = f"{gres['name']}:{gres['type']}"
            for file in nodes(gres["file"]) if gres.get("file") else []:
                number = re.fullmatch(r"/dev/nvidia(\d+)", file)
                if number and (every or int(number[1]) in cards):
                    text = f"{what} has {file}, which nvidia_driver_mig divides: give its MIG devices in devices"
                    yield "slurm_gres", text, host
            profile = str(gres["type"]).rpartition("_")[2]
            if gres.get("devices") and profile not in made:
                text = f"{what} has devices, but nvidia_driver_mig makes {', '.join(sorted(made))}: name it after one"
                yield "slurm_gres", text, host
            elif gres.get("devices") and not every and int(gres["count"]) > made[profile]:
                text = f"{what} has the count {gres['count']}, but nvidia_driver_mig makes {made[profile]}"
                yield "slurm_gres", text, host


def topology(site: Inventory) -> Iterator[Problem]:
    """Each node is at one switch (or in one block), and switches above others exist and come after them."""
    compute, seen = site.hosts("slurm_compute"), {}
    given = site.get("slurm_topology", [])
    names: list[str] = []
    for item in given:
        name, below = item["name"], item.get("switches", [])
        if bool(item.get("nodes")) == bool(below):
            yield "slurm_topology", f"{name} needs nodes or switches, and not both", ""
        if below and site.get("slurm_topology_type") == "block":
            yield "slurm_topology", f"{name} has switches, which slurm_topology_type: block has not", ""
        for switch in below:
            if switch not in names:
                yield "slurm_topology", f"{name} is above {switch}, which is not listed before it", ""
        names.append(name)
        try:
            listed = partition_nodes(item, compute) if item.get("nodes") else []
        except ValueError as error:
            yield "slurm_topology", f"{name}: {error}", ""
            continue
        for node in listed:
            if node not in compute:
                hint = close(node, compute)
                yield "slurm_topology", f"{name} has the node {node}, which is not in slurm_compute{hint}", ""
            elif node in seen:
                yield "slurm_topology", f"{node} is at {seen[node]} and at {name}: take it out of one", ""
            seen[node] = name
    left = [node for node in compute if node not in seen]
    if given and left:
        yield "slurm_topology", f"{one_of(left)} is at no switch: no job would have it together with another node", ""


OWNED = {
    "nodename": "slurm_node_groups",
    "partitionname": "slurm_partitions",
    "slurmctldhost": "the group slurm_controller",
    "clustername": "ictx_cluster_name",
    "statesavelocation": "slurm_state_dir",
}


def settings(site: Inventory) -> Iterator[Problem]:
    """Keys of slurm.conf that other variables have stay with those."""
    for key in site.get("slurm_config", {}):
        if key.lower() in OWNED:
            yield "slurm_config", f"{key} has a place of its own: {OWNED[key.lower()]}", ""


def controllers(site: Inventory) -> Iterator[Problem]:
    """Controllers share their state; what tracks processes fits what is built on it."""
    hosts, shared = site.hosts("slurm_controller"), site.get("ictx_shared_dir")
    state = site.get("slurm_state_dir", "/var/lib/slurm/slurmctld")
    if len(hosts) > 1 and shared and not f"{state}/".startswith(f"{str(shared).rstrip('/')}/"):
        yield (
            "slurm_state_dir",
            f"{state} is not shared, but there are {len(hosts)} controllers: put it below {shared}, or the backup "
            "starts without the jobs",
            "",
        )
    for host in site.hosts("slurm_compute"):
        for name in ("slurm_pam_adopt", "slurm_private_tmp"):
            if site.of(host, name) is True and site.of(host, "slurm_process_tracking") == "linuxproc":
                yield name, "needs cgroups: set slurm_process_tracking: cgroup", host
    count = len(site.hosts("k3s_server"))
    if count and count % 2 == 0 and site.get("kubernetes_distribution", "auto") in ("auto", "k3s"):
        text = f"has {count} hosts: etcd survives the loss of fewer than half, so take {count - 1} or {count + 1}"
        yield "group k3s_server", text, ""


def addresses(site: Inventory) -> Iterator[Problem]:
    """Every host has its own name and address, outside the networks of pods and services."""
    seen: dict[tuple[str, str], list[str]] = defaultdict(list)
    for host in site.hosts("all"):
        if site.of(host, "ansible_connection") != "local":
            seen[site.address(host), str(site.of(host, "ansible_port", 22))].append(host)
        if re.fullmatch(r"[0-9.]+", host) and not _network(host):
            yield f"host {host}", "is a number, which programs take for an address: give it a name", ""
        if any(len(label) > 63 for label in host.split(".")) or len(host) > 64:
            text = "has a name of more than 64 characters (63 a label), which no certificate can have"
            yield f"host {host}", text, ""
        right = host.lower().replace("_", "-")
        if host != right and host in site.hosts("k3s_server") + site.hosts("k3s_agent"):
            text = f"is a node of Kubernetes, whose names have neither capitals nor '_': name it {right}"
            yield f"host {host}", text, ""
        if (alone := _network(site.address(host))) and (alone.is_multicast or alone.is_unspecified):
            yield "ansible_host", f"{site.address(host)} is no address of a host", host
    for (address, _), hosts in seen.items():
        if len(hosts) > 1:
            yield "ansible_host", f"{' and '.join(hosts)} have the same address, {address}", ""
    networks = {name: _network(text) for name, text in _networks(site)}
    for name, network in networks.items():
        if network is None:
            continue
        for host in site.hosts("all"):
            inside = _network(site.address(host))
            if inside and inside.version == network.version and inside.subnet_of(network):  # type: ignore[arg-type]
                yield name, f"{network} has the address of {host} ({site.address(host)}): take another network", ""
        for other, second in networks.items():
            if other > name and second and second.version == network.version and network.overlaps(second):
                yield name, f"{network} overlaps {other} ({second})", ""


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _networks(site: Inventory) -> Iterator[tuple[str, str]]:
    if not site.hosts("k3s_server"):
        return
    distribution = site.get("kubernetes_distribution", "auto")
    if distribution in ("auto", "k3s"):
        config = site.get("k3s_config") or {}
        for key, default in K3S_NETWORKS.items():
            for text in str(config.get(key, default)).split(","):
                yield f"k3s_config.{key}", text.strip()
    if distribution != "k3s":
        for name, default in LAB_NETWORKS.items():
            yield name, str(site.get(name, default))


def endpoints(site: Inventory) -> Iterator[Problem]:
    """The registry and the services of Kubernetes answer where the inventory looks for them."""
    registry, hosts = str(site.get("ictx_registry", "")), site.hosts("registry")
    name, _, port = registry.rpartition(":")
    if hosts and registry:
        right = str(site.of(hosts[0], "registry_port", 5000))
        if not name or port != right:
            yield "ictx_registry", f"{registry} has not the port {right} (registry_port) at its end", ""
        names = [hosts[0], site.address(hosts[0]), *(site.of(hosts[0], "registry_hosts") or [])]
        if name and name.strip("[]") not in names:
            text = f"{name} is not a name of {hosts[0]}, so that its certificate lacks it: take one of {one_of(names)}"
            yield "ictx_registry", f"{text}, or add it to registry_hosts", ""
    ports: dict[int, str] = {}
    charts = {name: site.get(name) for name in ("ictx_mlflow_values", "ictx_serving_values", "ictx_judge_values")}
    for release in site.get("ictx_serving_releases") or []:
        charts[f"ictx_serving_releases: {release['name']}"] = release.get("values")
    for values, given in charts.items():
        service = (given or {}).get("service") or {}
        node_port = service.get("nodePort") if isinstance(service, Mapping) else None
        if service.get("type") != "NodePort" or not isinstance(node_port, int):
            continue
        if node_port not in NODE_PORTS:
            yield values, f"service.nodePort {node_port} is not one of 30000 to 32767", ""
        if node_port in ports:
            yield values, f"service.nodePort {node_port} is that of {ports[node_port]} too", ""
        ports[node_port] = values
        uri = re.fullmatch(r"https?://[^/]+?(?::(\d+))?(?:/.*)?", str(site.get("ictx_mlflow_uri", "")))
        if values == "ictx_mlflow_values" and uri and uri[1] != str(node_port):
            yield "ictx_mlflow_uri", f"its port is {uri[1] or 'not given'}, but MLflow's nodePort is {node_port}", ""


def releases(site: Inventory) -> Iterator[Problem]:
    """Releases behind the address of the served model have names and models of their own."""
    described = filter_loader.get("release_problems").j2_function
    for text in described(site.get("ictx_serving_releases") or [], site.get("ictx_serving_values") or {}):
        yield "ictx_serving_releases", text, ""


def registries(site: Inventory) -> Iterator[Problem]:
    """There is one registry, ours or another, and what opens it is there."""
    hosts, other = site.hosts("registry"), site.get("ictx_registry_external")
    if hosts and other is not None:
        text = f"has no effect: {one_of(hosts)} in the group registry is ours: empty the group, or remove this"
        yield "ictx_registry_external", text, ""
    if "registry" in site.groups and not hosts and other is None:
        text = "has no host: add one, or set ictx_registry_external to how the registry at ictx_registry is used"
        yield "group registry", f"{text} ({{}} if by everybody)", ""
    for prefix in ("", "push_"):
        user, password = ((other or {}).get(f"{prefix}{part}") for part in ("user", "password_file"))
        if bool(user) != bool(password):
            yield "ictx_registry_external", f"needs both {prefix}user and {prefix}password_file, or neither", ""
    for name in ("ca_file", "password_file", "push_password_file"):
        file = (other or {}).get(name)
        if file and not Path(file).is_file():
            yield "ictx_registry_external", f"{name} {file} is not on the control host: put it there", ""


def sign_in(site: Inventory) -> Iterator[Problem]:
    """The provider at which people sign in to MLflow is verified, and what opens it is there."""
    oidc = site.get("ictx_mlflow_oidc")
    if oidc is None:
        return
    if not re.fullmatch(r"https://[^\s?#]+", str(oidc.get("issuer", ""))):
        yield "ictx_mlflow_oidc", f"issuer is {oidc.get('issuer')!r}: must be the provider's https:// URL", ""
    if not str(oidc.get("url") or site.get("ictx_mlflow_uri", "")).startswith("https://"):
        yield "ictx_mlflow_oidc", "sessions would be readable on the network: set url to https://", ""
    if not site.hosts("k3s_server"):
        yield "ictx_mlflow_oidc", "has no effect: the group k3s_server is empty, so there is no server of MLflow", ""
    for name in ("client_secret_file", "ca_file"):
        file = oidc.get(name)
        if file and not Path(file).is_file():
            yield "ictx_mlflow_oidc", f"{name} {file} is not on the control host: put it there", ""


def folders(site: Inventory) -> Iterator[Problem]:
    """The platform's folders are its own, and secrets are not on shared storage."""
    shared, state, cache = (site.get(f"ictx_{kind}_dir") for kind in ("shared", "state", "cache"))
    named = {"ictx_shared_dir": shared, "ictx_state_dir": state, "ictx_cache_dir": cache}
    for name, folder in named.items():
        hidden = name == "ictx_shared_dir" and HIDDEN_FOLDERS.fullmatch(str(folder).rstrip("/"))
        if folder and (hidden or SYSTEM_FOLDERS.fullmatch(str(folder).rstrip("/") or "/")):
            yield name, f"{folder} is the system's: take a folder of its own, such as {folder.rstrip('/')}/ictx", ""
    if shared and state and _below(state, shared):
        yield "ictx_state_dir", f"{state} has the platform's secrets, and is on shared storage ({shared}): move it", ""
    if state and cache and (_below(state, cache) or _below(cache, state)):
        yield "ictx_cache_dir", f"{cache} may be deleted at any time, and {state} never: neither below the other", ""
    if site.hosts("storage_server") and site.get("storage_type") == "nfs" and site.get("storage_nfs_clients") == []:
        yield "storage_nfs_clients", "is empty, so that no node can mount the export: list the nodes' networks", ""
    if site.get("ictx_backup") is True and not site.get("ictx_backup_repository"):
        yield "ictx_backup_repository", "is not set, but ictx_backup is on: name a repository of restic", ""


def _below(folder: Any, other: Any) -> bool:
    return f"{str(folder).rstrip('/')}/".startswith(f"{str(other).rstrip('/')}/")


def receivers(site: Inventory) -> Iterator[Problem]:
    """Alerts reach somebody."""
    given = site.get("alertmanager_receivers") or []
    for name, count in Counter(str(receiver["name"]) for receiver in given).items():
        if count > 1 or name == "nobody":
            text = f"{count} items have the name {name}" if count > 1 else "the name nobody is taken"
            yield "alertmanager_receivers", text, ""
    for receiver in given:
        name, kinds = receiver["name"], [
            key for key in ("webhook_url", "slack_url_file", "email_to") if receiver.get(key)
        ]
        if not kinds:
            yield "alertmanager_receivers", f"{name} needs webhook_url, slack_url_file or email_to", ""
        if receiver.get("slack_url_file") and not receiver.get("slack_channel"):
            yield "alertmanager_receivers", f"{name} has slack_url_file, and needs slack_channel", ""
        if not str(site.get("prometheus_runbook_url", "")).startswith(("https://", "http://")):
            text = (
                "must be an address where receivers of alerts can open docs/runbooks, as https://git.example.org/docs"
            )
            yield "prometheus_runbook_url", text, ""
        if receiver.get("email_to") and not site.get("alertmanager_smtp"):
            yield "alertmanager_receivers", f"{name} has email_to, which needs alertmanager_smtp", ""


def proxies(site: Inventory) -> Iterator[Problem]:
    """A proxy is one, and every program finds the same."""
    proxy = site.get("ictx_proxy")
    if proxy is not None and not (proxy.get("http") or proxy.get("https")):
        yield "ictx_proxy", "has neither http nor https: set one, as {http: http://proxy.example.org:3128}", ""
    for scheme in ("http", "https"):
        address = str((proxy or {}).get(scheme) or "")
        if address and not re.fullmatch(r"https?://[^/]+:\d+/?", address):
            text = f"{scheme}: {address} has no port, of which programs take different ones: add it, as :3128"
            yield "ictx_proxy", text, ""


# Of packages whose version a variable of their role has.
PINNED = {"grafana": "grafana_version", "nvidia-": "nvidia_driver_version"}


def pins(site: Inventory) -> Iterator[Problem]:
    """A package has one pin, and none beside a variable of its own."""
    for host in site.hosts("all"):
        given = [name for pin in site.of(host, "common_apt_pins") or [] for name in pin["packages"]]
        for name, count in Counter(given).items():
            if count > 1:
                yield "common_apt_pins", f"{name} has {count} pins, of which apt takes the first: leave one", host
            if own := next((variable for start, variable in PINNED.items() if name.startswith(start)), ""):
                yield "common_apt_pins", f"{name} has a variable of its own: {own}", host


# Those of playbooks/monitoring.yml.
OWN_JOBS = ("node", "mysqld", "dcgm", "blackbox", "prometheus", "alertmanager", "endpoints", "mlflow-endpoints")


def scrapes(site: Inventory) -> Iterator[Problem]:
    """Jobs of Prometheus have names of their own, and find targets."""
    native = [{"job_name": "", **job} for job in site.get("prometheus_extra_scrape_configs", [])]
    if not all(job["job_name"] for job in native):
        yield "prometheus_extra_scrape_configs", "each item needs a job_name", ""
    names = [*OWN_JOBS, *(scrape["name"] for scrape in site.get("prometheus_extra_scrapes", []))]
    for name, count in Counter([*names, *(job["job_name"] for job in native)]).items():
        if name and count > 1:
            text = f"{count} jobs have the name {name}" + (", which is one of ours" if name in OWN_JOBS else "")
            where = "_scrape_configs" if name in (job["job_name"] for job in native) else "_scrapes"
            yield f"prometheus_extra{where}", f"{text}: give each another", ""
    for job in native:
        if not any(key == "static_configs" or key.endswith("_sd_configs") for key in job):
            text = f"{job['job_name']} finds no targets: add static_configs, or one of the *_sd_configs"
            yield "prometheus_extra_scrape_configs", text, ""


def versions(site: Inventory) -> Iterator[Problem]:
    """A pinned driver is of the configured branch, and a release of Prometheus is known by its checksum."""
    branch, version = (str(site.get(f"nvidia_driver_{part}") or "") for part in ("branch", "version"))
    if branch and version and version.split(".")[0] != branch:
        yield "nvidia_driver_version", f"{version} is not of nvidia_driver_branch {branch}", ""
    release, known = str(site.get("prometheus_version") or ""), site.get("prometheus_checksums") or {}
    if site.get("prometheus_source") == "upstream" and release and release not in known:
        text = f"{release} is not one of prometheus_checksums ({', '.join(known)}): add the SHA-256 of its archive"
        yield "prometheus_version", text, ""


def ports(site: Inventory) -> Iterator[Problem]:
    """No two services of a host listen on one port."""
    for host in site.hosts("all"):
        taken: dict[str, list[str]] = defaultdict(list)
        for name in sorted(site.of(host, "_listening") or []):
            value = str(site.of(host, name, ""))
            port = re.fullmatch(r"(?:.*:)?(\d+)", value)
            if port and not value.startswith("127."):
                taken[port[1]].append(name)
        for port_number, names in taken.items():
            if len(names) > 1:
                yield names[1], f"{names[0]} listens on port {port_number} too", host


RULES: tuple[Callable[[Inventory], Iterator[Problem]], ...] = (
    partitions, jobs, accounts, node_groups, resources, mig, controllers, addresses, endpoints, folders, receivers,
    versions, ports, settings, topology, scrapes, proxies, pins, registries, releases, sign_in
)  # fmt: skip
# Filters that return more of them.
RULES_ELSEWHERE = ("slurm_rules", "host_rules", "service_rules")


def meaning_problems(values: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Returns what is wrong with values that have the right form, by hosts' variables and groups.

    A rule that meets a value of another form than it expects, which is reported elsewhere, finds nothing.
    """
    site, found = Inventory(values, groups), []
    others = [rule for name in RULES_ELSEWHERE for rule in filter_loader.get(name).j2_function()]
    for rule in (*RULES, *others):
        try:
            found += list(rule(site))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return found


def declared_by_node(
    values: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns what each compute node is declared to have, by variable; nothing where one has another form."""
    site = Inventory(values, groups)
    try:
        found = {host: site.hardware(host) for host in site.hosts("slurm_compute")}
        for layer in (layer for layers in found.values() for layer in layers.values()):
            for gres in layer.get("gres", []):
                nodes(gres.get("file") or "")
        return found
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"declared_by_node": declared_by_node, "meaning_problems": meaning_problems}
