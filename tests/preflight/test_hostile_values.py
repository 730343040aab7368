"""Preflight rejects values that would change other lines of a file or other words of a command, and never raises."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleError
from cluster import ROOT, Cluster
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from templates.test_templates import REGISTERED

LAB = ROOT / "inventories/lab"
FORMATS: dict[str, Any] = yaml.safe_load((ROOT / "playbooks/plugins/inventory_formats.yml").read_text())
SCHEMA: dict[str, Any] = yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())

M2 = pytest.mark.attack(
    "M2",
    "An inventory contains null, system users, control characters, shell metacharacters or wrong types",
    before="preflight found nothing, or ended with a traceback; SlurmUser=root and shell commands got into files",
    now="rejected by name before anything is changed; fuzzed with hypothesis",
)


def arguments() -> dict[str, str]:
    """Returns the action's arguments in playbooks/preflight.yml."""
    plugins = ROOT / "playbooks/plugins"
    return {
        "playbook": str(ROOT / "site.yml"),
        "roles_dir": str(ROOT / "roles"),
        "schema": str(plugins / "inventory_schema.yml"),
        "formats": str(plugins / "inventory_formats.yml"),
    }


def load_plugin() -> ModuleType:
    """Returns the action plug-in as a module."""
    file = ROOT / "playbooks/plugins/action/check_inventory.py"
    spec = importlib.util.spec_from_file_location("check_inventory", file)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    # Its named tuples need their module in sys.modules.
    sys.modules["check_inventory"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


PLUGIN = load_plugin()


@cache
def lab() -> Cluster:
    """Returns the lab's inventory."""
    return Cluster(LAB)


def problems(**variables: Any) -> list[str]:
    """Returns the problems of the lab's inventory with these variables overridden."""
    lab().manager._extra_vars = variables
    result = lab().act("check_inventory", **arguments())
    assert not result.get("failed"), result
    assert all(line.isprintable() for line in result["problems"]), result["problems"]
    return result["problems"]


def options() -> dict[str, dict[str, Any]]:
    """Returns the option of every variable."""
    roles = PLUGIN.read_options(ROOT / "roles").values()
    return {name: option for role in roles for name, option in role.items()} | SCHEMA["variables"]


OPTIONS = options()


def refused(name: str, value: Any) -> list[str]:
    """Returns the problems that the action finds in the value of one variable."""
    found = PLUGIN.Problems(["here"])
    PLUGIN.check_values({"here": {name: value}}, OPTIONS, PLUGIN.Formats(FORMATS), found)
    assert all(line.isprintable() and line.startswith(f"{name} (here): ") for line in found.lines())
    return found.lines()


def users(**values: Any) -> list[dict[str, Any]]:
    """Returns a list of one user."""
    return [{"name": "alice", "uid": 2001, **values}]


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]

STAGE = {"config": "a", "after": "pretrain"}

# fmt: off
NAMES = ["root", "Root", "daemon", "slurm", "serving", "systemd-x", "../../etc/x", "a b", "a\n", "-a", ".a", "", "a:b",
         "é", "a/b", "x" * 33, "*", "$(id)", 5, True, None, b"alice", ["alice"]]
UIDS = [0, -1, 1, 999, 2000, 65534, 2**32, True, 2001.5, float("inf"), [2001], "0", None]
PARTITIONS = ["a\nSlurmUser=root", "DEFAULT", "ALL", "a Nodes=n1", "a,b", "", "a#", 5.5]
VALUES: dict[str, list[Any]] = {
    "ansible_host": ["n1\nn2", "-oProxyCommand=id", ":0", ":", "fd00:1"],
    "ansible_port": ["ssh", 0],
    "ansible_user": ["a b"],
    "backup_environment": [{"A B": "c"}],
    "backup_on_calendar": ["", " 0", "daily ", "daily\nPersistent=no", "$(id)"],
    "common_apt_pins": [[{"packages": ["a b"], "version": "1"}], [{"packages": ["a"], "version": "1\nPackage: x"}]],
    "ictx_backup_repository": ["rest:https://u:p@h/"],
    "ictx_cluster_name": [None, "", "a b; touch /tmp/x", "a\nSlurmUser=root", "$(id)", "DEFAULT", "a=b", "a\x1b[2J",
                          5.5, b"a"],
    "ictx_mlflow_uri": ["http://u:p@h", "ftp://h", "http://h/a b", "http://h\nX", "http://", "http://h/'", "h"],
    "ictx_proxy": [{"http": 'http://p:1";Dir "/'}, {"no_proxy": ["a\nb"]}],
    "ictx_registry_external": [{"user": "a:b"}, {"ca_file": "../x"}],
    "ictx_registry": ["a b:5000", "http://a", "a:b", "u:p@a:5000", "a:5000/x", "a\n:5000", "$(id)"],
    "ictx_serving_values": [{"a": {"b": [{"c": "d\x00"}]}}, {"a": {7: "b"}}, {"a": "\ud800"}, {"a": b"x"}],
    "ictx_shared_dir": [None, "", "/a b", "/a/../b", "/..", "a/b", "/a\nb", "/a;b", "/a'b", "/$HOME", "/", "/a:b", 5.5,
                        ["/a"]],
    "ictx_shared_min_free_gb": [float("nan"), -1, True],
    "ictx_unit_dropins": [{"slurmd": {"Service": {"Nice": "5\nExecStart=/x"}}}],
    "ictx_users": [
        *(users(uid=uid) for uid in UIDS), *(users(name=name) for name in NAMES),
        users() + users(), users() + users(name="bob"), users() + users(uid=2002),
        users(ssh_keys=["ssh-ed25519 AAAA a\nssh-ed25519 BBBB"]), [{1: 2, "name": "alice", "uid": 2001}],
        {"alice": 2001},
    ],
    "image_bake_python": [3.10],
    "k3s_config": [{"a": CYCLE}],
    "kubernetes_reader_account": ["", "a.b", "A", "-a", "x" * 64],
    "kubernetes_reader_namespaces": [[""], ["a b"], ["kube-system", "A"]],
    "nvidia_driver_version": [False],
    "prometheus_extra_scrape_configs": [[{"job_name": "a\nb"}], [{"job_name": "a", "x": "\x00"}]],
    "prometheus_labels": [{"a": "b\nc"}, {5: "b"}],
    "registry_port": [0, 65536],
    "slurm_account": ["a'; DROP TABLE x"],
    "slurm_gres": [[{"name": "gpu", "type": "a b", "count": 1}],
                   [{"name": "gpu", "type": "a", "count": 1, "file": "/dev/nvidia0 Count=9"}]],
    "slurm_jobs_corpus": [DEEP, ["/a b"], ["x"]],
    "slurm_jobs_stages": [
        5, ["sft"], {"sft": 5}, {"sft\n": STAGE}, {"a/b": {**STAGE, "kind": "sft"}},
        *({"sft": {**STAGE, **part}} for part in (
            {"config": "a b"}, {"config": "../x"}, {"time": "1 #x"}, {"nodes": "1 2"}, {"corpus": ["/a b"]}, {"x": 1},
            {"after": "a\nb"}, {"partition": "a,b"}, {"alias": "a;id"})),
    ],
    "slurm_kill_wait": [None, 2**31, 1 << 20000, True, "1e3", -1],
    "slurm_partitions": [
        *([{"name": name}] for name in PARTITIONS), [{"name": "a"}, {"name": "a"}], [{"name": "a", 5: "b"}], [CYCLE],
        [{"name": "a", "nodes": ["n1", "n2 State=DOWN"]}], [{"name": "a", "nodes": {"n1": 1}}],
        [{"name": "a", "max_time": "1 State=DOWN"}],
    ],
    "storage_folders": [[{"path": "../x", "mode": "0755"}], [{"path": "x", "mode": "u+s"}]],
    "storage_nfs_clients": [["192.0.2.0/24(rw,no_root_squash) *"]],
}
# fmt: on
REFUSED = [
    pytest.param(name, value, id=f"{name}{n}") for name, found in VALUES.items() for n, value in enumerate(found)
]


@M2
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_hostile_value_is_refused_by_name(name: str, value: Any) -> None:
    assert refused(name, value)


@pytest.mark.parametrize("address", ["n1", "n1.example.org", "10.0.0.1", "::1", "fd00:10::15", "::ffff:10.0.0.1"])
def test_an_address_is_accepted(address: str) -> None:
    assert not refused("ansible_host", address)


@M2
def test_preflight_names_each_of_many_hostile_values() -> None:
    found = problems(**{name: values[-1] for name, values in VALUES.items()})
    assert {line.split(" (")[0] for line in found} >= VALUES.keys()


@M2
@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        pytest.param("all: {hosts: {'a;id': }}", "host 'a;id': its name must be", id="a host"),
        pytest.param("all: {hosts: {DEFAULT: }}", "host 'DEFAULT': its name must be", id="a word of SLURM"),
        pytest.param("all: {hosts: {x: }, vars: {5: x}}", "variable 5 (x): its name must be text", id="a variable"),
        pytest.param(
            "all: {hosts: {x: {ictx_users: [{5: x}]}}}", "ictx_users (x): each item has the key 5: ", id="a key"
        ),
        pytest.param(
            "all: {hosts: {x: {ictx_users: 2024-01-01}}}", "ictx_users (x): must be a list, got ", id="a date"
        ),
        pytest.param(
            "all: {hosts: {x: {ictx_cluster_name: !!binary aGk=}}}", "ictx_cluster_name (x): must be ", id="bytes"
        ),
        pytest.param(
            "all: {hosts: {x: {ictx_cluster_name: !unsafe 'a b'}}}", "ictx_cluster_name (x): must be ", id="a tag"
        ),
    ],
)
def test_a_hostile_inventory_is_refused(tmp_path: Path, hosts: str, line: str) -> None:
    (tmp_path / "hosts.yml").write_text(hosts)
    result = Cluster(tmp_path / "hosts.yml").act("check_inventory", **arguments())
    assert [found for found in result["problems"] if found.startswith(line)], result["problems"]


def test_every_default_of_a_role_passes() -> None:
    """Otherwise an inventory that repeats a default would be rejected."""
    defaults = {}
    for file in ROOT.glob("roles/*/defaults/main.yml"):
        if file.parts[-3] != "lab":
            defaults |= yaml.safe_load(file.read_text()) or {}
    wrong = [refused(name, value) for name, value in defaults.items() if not OPTIONS[name].get("required")]
    # The others contain templates, which are evaluated before validation.
    assert [line for found in wrong for line in found if "{{" not in line] == []


HOSTILE = [
    "x\nSlurmUser=root",
    "a b",
    "x State=DOWN",
    "$(id)",
    "`id`",
    "a;b",
    "a'b",
    'a"b',
    "a: b",
    "a #b",
    "a:",
    "-x",
    "%n",
    "a\\",
]
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.dates()
    | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def format_of(path: str, kind: str) -> dict[str, Any]:
    """Returns the format of a value by preflight's rules."""
    names = (
        rule["format"]
        for rule in FORMATS["variables"]
        if re.fullmatch(rule["match"].replace(".", r"\.").replace("*", ".*"), path)
    )
    return FORMATS["formats"][next(names, FORMATS["types"].get(kind, "word"))]


def values(path: str, option: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Returns values of a variable, most of them of the right type and form."""
    kind = option.get("type", "str")
    if "choices" in option and kind != "list":
        return st.sampled_from(option["choices"])
    if kind == "list":
        part = {"type": option.get("elements", "str"), "options": option.get("options", {})}
        return st.lists(
            values(path, part) if "choices" not in option else st.sampled_from(option["choices"]), max_size=3
        )
    if kind == "dict" and option.get("options"):
        parts = {name: values(f"{path}.{name}", inner) for name, inner in option["options"].items()}
        needed = {name for name, inner in option["options"].items() if inner.get("required")}
        return st.fixed_dictionaries(
            {n: parts[n] for n in needed}, optional={n: s for n, s in parts.items() if n not in needed}
        )
    if kind == "dict":
        return st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), values(f"{path}.x", {}), max_size=3)
    if kind == "bool":
        return st.booleans()
    form = format_of(path, kind)
    if "pattern" not in form:
        return st.integers(math.ceil(form["min"]), int(form["max"]))
    return (
        st.from_regex(re.compile(form["pattern"], re.ASCII), fullmatch=True)
        | st.text(max_size=8)
        | st.sampled_from(HOSTILE)
    )


@cache
def templates() -> dict[Path, tuple[str, dict[str, Any]]]:
    """Returns for each template its text with the play's variables, and the variables of a host that renders it."""
    found: dict[Path, tuple[str, dict[str, Any]]] = {}
    lab().manager._extra_vars = {"lab_state_dir": "/nonexistent", "ictx_state_dir": "/nonexistent"}
    for role, play, hosts in lab().uses("site.yml"):
        files = [file for file in Path(role._role_path, "templates").glob("**/*.j2") if hosts and file not in found]
        if files:
            seen = {**lab().variables(hosts[0], play, role), **REGISTERED.get(role.get_name(), {})}
            given = str(play.get_vars()) + str(list(role._role_params.values()))
            # Values that a template loops over may be composed there.
            made = Path(role._role_path, "vars/main.yml")
            given += made.read_text() if made.exists() else ""
            found |= {file: (file.read_text() + given, seen) for file in files}
    return found


def benign(value: Any) -> Any:
    """Returns the value with a letter in place of every character that is special in a shell, INI or YAML."""
    if isinstance(value, str):
        return re.sub(r"[^\w.:/-]|:$|^-", "x", value, flags=re.ASCII)
    if isinstance(value, dict):
        return {key: benign(part) for key, part in value.items()}
    return [benign(part) for part in value] if isinstance(value, list) else value


def structure(template: Path, text: str) -> Any:
    """Returns a file's text without its values: keys of YAML or JSON, else words and settings of each line."""
    if re.search(r"\.(ya?ml|json)\.j2$", template.name):
        return shape(list(yaml.safe_load_all(text)))
    # A calendar time extends to the end of its line and may contain blanks.
    lines = [re.sub("^(OnCalendar=).*", r"\1x", line) for line in text.splitlines()]
    return [(len(line.split()), len(re.findall(r"(?:^|\s)[A-Za-z][\w.-]*\s*=", line))) for line in lines]


def shape(value: Any) -> Any:
    """Returns the keys and lengths of a value."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    return [shape(part) for part in value] if isinstance(value, list) else None


def rendered(name: str, value: Any) -> Iterator[tuple[Path, str | None]]:
    """Yields the files that use the variable, rendered with this value; `None` if rendering fails."""
    for template, (text, variables) in templates().items():
        if not re.search(rf"\b{name}\b", text):
            continue
        try:
            yield template, lab().render(template, {**variables, name: value})
        except AnsibleError:
            yield template, None


@M2
@pytest.mark.full
@settings(suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)), ANYTHING, max_size=10))
def test_preflight_never_raises(variables: dict[str, Any]) -> None:
    problems(**variables)


@M2
@settings(suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_preflight_accepts_changes_no_other_line(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OPTIONS)), label="variable")
    value = data.draw(values(name, OPTIONS[name]) | values(name, OPTIONS[name]) | ANYTHING, label="value")
    assume(not refused(name, value))
    plain = dict(rendered(name, benign(value)))
    for template, text in rendered(name, value):
        if text is None or plain[template] is None:
            continue
        assert structure(template, text) == structure(template, plain[template]), f"{template.name}: {text}"
