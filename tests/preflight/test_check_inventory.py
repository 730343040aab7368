"""Each error of an inventory is reported in one line with the variable or group and the allowed values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT, Cluster

Check = Callable[..., list[str]]


def problems(inventory: Path, extra: dict[str, Any] | None = None, playbook: Path = ROOT / "site.yml") -> list[str]:
    """Returns the problems that the action plug-in finds."""
    result = Cluster(inventory, extra).act(
        "check_inventory",
        playbook=str(playbook),
        roles_dir=str(ROOT / "roles"),
        schema=str(ROOT / "playbooks/plugins/inventory_schema.yml"),
        formats=str(ROOT / "playbooks/plugins/inventory_formats.yml"),
    )
    assert not result.get("failed"), result
    assert result["changed"] is False
    return result["problems"]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Returns a function that validates a copy of the lab's inventory with changed group variables or hosts."""

    def checked(variables: str = "", group: str = "all", hosts: Callable[[Any], Any] | None = None) -> list[str]:
        copy = shutil.copytree(ROOT / "inventories/lab", tmp_path / "inventory")
        folder = copy / "group_vars" / group
        if folder.with_suffix(".yml").exists():
            folder.mkdir()
            folder.with_suffix(".yml").rename(folder / "main.yml")
        folder.mkdir(exist_ok=True)
        (folder / "zz_test.yml").write_text(variables or "{}")
        if hosts:
            file = copy / "hosts.yml"
            content = yaml.safe_load(file.read_text())
            hosts(content["all"]["children"])
            file.write_text(yaml.safe_dump(content, sort_keys=False))
        return problems(copy)

    return checked


def test_files_of_variables_that_nothing_reads_are_named(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "inventories/lab", tmp_path / "inventory")
    (copy / "host_vars").mkdir(exist_ok=True)
    for name in ("n1.yml", "n2", ".n3.yml.swp", "n4.yml~", "README.md", "notes.txt"):
        (copy / "host_vars" / name).write_text("a: 1")
    (copy / "group_vars/ungrouped.json").write_text("{}")
    assert problems(copy) == []

    (copy / "group_vars/slurm_computes.yml").write_text("a: 1")
    (copy / "group_vars/rack.d").mkdir()
    (copy / "host_vars/far-away").write_text("a: 1")
    assert problems(copy) == [
        "group_vars/rack.d: there is no group rack.d, so that nothing reads it: rename it, or remove it",
        "group_vars/slurm_computes.yml: there is no group slurm_computes, so that nothing reads it: "
        "did you mean slurm_compute?",
        "host_vars/far-away: there is no host far-away, so that nothing reads it: rename it, or remove it",
    ]


def test_the_lab_has_no_problem() -> None:
    assert problems(ROOT / "inventories/lab") == []


def test_the_example_lacks_only_what_nobody_else_can_know() -> None:
    found = problems(ROOT / "inventories/example")
    assert len(found) == 1, found
    assert found[0].startswith("image_bake_base (all hosts): replace CHANGE-ME in nvcr.io/")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        pytest.param(
            "slurm_process_tracking: foo",
            "slurm_process_tracking (all hosts): must be one of: cgroup, linuxproc, got: foo",
            id="choice",
        ),
        pytest.param(
            "slurm_kill_wait: soon",
            "slurm_kill_wait (all hosts): must be a whole number from 0 to 65533, got 'soon'",
            id="no number",
        ),
        pytest.param(
            "slurm_kill_wait: [60]", "slurm_kill_wait (all hosts): must be of type int, got [60]", id="a list"
        ),
        pytest.param(
            "slurm_jobs_corpus: /data", "slurm_jobs_corpus (all hosts): must be a list, got '/data'", id="no list"
        ),
        pytest.param(
            "slurm_jobs_corpus: [{a: b}]",
            "slurm_jobs_corpus (all hosts): each item must be of type path, got {'a': 'b'}",
            id="item",
        ),
        pytest.param(
            "image_bake_base: debian", "image_bake_base (all hosts): must be a dictionary, got 'debian'", id="no dict"
        ),
        pytest.param(
            f"image_bake_base: {{image: 'a@sha256:{'a' * 64}', release: b}}",
            "image_bake_base (all hosts): parameters are mutually exclusive: image|release found in image_bake_base",
            id="exclusive",
        ),
        pytest.param(
            "slurm_slurmd_timeot: 5",
            "slurm_slurmd_timeot (all hosts): unknown variable of the role slurm; did you mean slurm_slurmd_timeout?",
            id="typo",
        ),
        pytest.param(
            "slrum_account: x",
            "slrum_account (all hosts): no role has this variable; did you mean slurm_account?",
            id="typo in the role",
        ),
        pytest.param(
            "ictx_shard_dir: /x",
            "ictx_shard_dir (all hosts): unknown variable of the cluster; did you mean ictx_shared_dir?",
            id="typo of the cluster",
        ),
        pytest.param(
            "ictx_users: [{name: a}]",
            "ictx_users (all hosts): missing required arguments: uid found in ictx_users",
            id="item without uid",
        ),
        pytest.param(
            "slurm_users: [x]",
            "slurm_users (ctl, n1, n2): has no effect: playbooks/slurm.yml sets it to "
            "{{ ictx_users | present_users | map(attribute='name') }}",
            id="no effect",
        ),
        pytest.param(
            "storage_shared_dir: '{{ nowhere }}/x'",
            "storage_shared_dir (all hosts): cannot be evaluated: 'nowhere' is undefined",
            id="undefined",
        ),
        pytest.param(
            "slurm_account: CHANGE-ME", "slurm_account (all hosts): replace CHANGE-ME in CHANGE-ME", id="placeholder"
        ),
    ],
)
def test_a_wrong_variable_is_named(check: Check, variables: str, line: str) -> None:
    assert line in check(variables)


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        pytest.param(
            "{sf: {config: a, after: pretrain}}", "sf: unknown stage: rename it pretrain, ", id="unknown stage"
        ),
        pytest.param("{sft: {config: a, after: extend}}", "sft: after is extend: no such stage", id="unknown parent"),
        pytest.param("{sft: {config: a}}", "sft: after is missing", id="no parent"),
        pytest.param("{sft: {after: pretrain}}", "sft: config is missing", id="no config"),
        pytest.param(
            "{sft: {config: a, after: dpo}, dpo: {config: b, after: x}, x: {kind: extend, config: c, after: sft}}",
            "sft: comes after itself: sft → x → dpo → sft",
            id="circle",
        ),
        pytest.param("{sft: {config: a, after: sft}}", "sft: comes after itself: sft → sft", id="itself"),
        pytest.param(
            "{sft: {config: a, after: pretrain, time: 1:30:00}}",
            "sft: time is 5400: must be text: put it in quotes",
            id="time",
        ),
        pytest.param(
            "{sft: {config: a, after: pretrain, nodes: 0}}", "sft: nodes is 0: expected 1 or more", id="nodes"
        ),
        pytest.param(
            "{sft: {config: a, after: pretrain, node: 2}}", "sft: node. Supported parameters", id="unknown option"
        ),
        pytest.param(
            "{pretrain: {after: pretrain}}",
            "pretrain: after is pretrain: pretraining starts from scratch, remove it",
            id="root",
        ),
    ],
)
def test_what_is_wrong_with_a_stage_is_named(check: Check, stages: str, line: str) -> None:
    found = check(f"slurm_jobs_stages: {stages}")
    assert [one for one in found if one.startswith("slurm_jobs_stages (all hosts): ") and line in one], found


def test_a_time_that_yaml_takes_for_a_number_is_refused(check: Check) -> None:
    assert check("slurm_jobs_time: 1:30:00") == ["slurm_jobs_time (all hosts): must be text: put it in quotes"]


def test_a_variable_of_one_group_names_its_hosts(check: Check) -> None:
    assert check("slurm_kill_wait: soon", "slurm_compute") == [
        "slurm_kill_wait (n1, n2): must be a whole number from 0 to 65533, got 'soon'"
    ]


def test_a_variable_may_use_what_a_role_or_the_facts_bring(check: Check) -> None:
    assert (
        check("slurm_jobs_mlflow_uri: '{{ slurm_jobs_image_dir }}/x'\nslurm_kill_wait: '{{ ansible_facts.nothing }}'")
        == []
    )


def test_a_missing_variable_of_a_role_names_the_role_and_the_host(check: Check, tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "inventories/lab", tmp_path / "lab")
    file = copy / "group_vars/all/images.yml"
    content = yaml.safe_load(file.read_text())
    del content["image_bake_base"]
    file.write_text(yaml.safe_dump(content))
    assert problems(copy) == [
        "image_bake_base (svc1): missing, but required by the role image_bake: Base of the image."
    ]


def test_variables_that_a_play_reads_from_files_are_given(tmp_path: Path) -> None:
    """Paths of files are relative to the playbook that names them, also if another one imports it."""
    given = {"one": {"k3s_cache_dir": "/one"}, "two": {"k3s_token_file": "/two", "k3s_agent_token_file": "/three"}}

    def found(inventory: Path, *files: str) -> dict[str, str]:
        site = tmp_path / "-".join([inventory.name, *files]) / "site.yml"
        plays = site.parent / "playbooks"
        shutil.copytree(ROOT / "playbooks/vars", plays / "vars")
        for name in files:
            (plays / f"vars/{name}.yml").write_text(yaml.safe_dump(given[name]))
        play = {"hosts": "k3s_server", "vars_files": [f"vars/{name}.yml" for name in files], "roles": ["k3s"]}
        (plays / "k3s.yml").write_text(yaml.safe_dump([play]))
        site.write_text(yaml.safe_dump([{"import_playbook": "playbooks/k3s.yml"}]))
        lines = problems(inventory, playbook=site)
        return dict(line.split(" (kube1): ", 1) for line in lines if " (kube1): " in line)

    lab = ROOT / "inventories/lab"
    without, with_files = found(lab), found(lab, "one", "two")
    named = {name for variables in given.values() for name in variables}
    assert {without[name].partition(",")[0] for name in named} == {"missing"}
    assert without.keys() - with_files.keys() == named
    changed = shutil.copytree(lab, tmp_path / "changed")
    (changed / "group_vars/all/zz_test.yml").write_text("k3s_cache_dir: /x")
    assert found(changed, "one")["k3s_cache_dir"] == "has no effect: playbooks/k3s.yml sets it to /one"
    assert "k3s_cache_dir" not in found(changed)


def test_a_missing_variable_of_the_cluster_is_named(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "inventories/lab", tmp_path / "lab")
    file = copy / "group_vars/all/main.yml"
    file.write_text(file.read_text().replace("ictx_cluster_name", "cluster_name"))
    assert "ictx_cluster_name (all hosts): missing, but required: Name of the cluster" in problems(copy)


def test_a_variable_of_the_cluster_is_the_same_everywhere(check: Check) -> None:
    assert check("ictx_shared_dir: /elsewhere", "slurm_compute") == [
        "ictx_shared_dir: must be the same on every host, got '/elsewhere', '/shared'"
    ]


def test_extra_variables_are_checked_too() -> None:
    found = problems(ROOT / "inventories/lab", {"slurm_kill_wait": "soon"})
    assert found == ["slurm_kill_wait (all hosts): must be a whole number from 0 to 65533, got 'soon'"]


def test_a_missing_group_is_named_with_the_one_that_was_meant(check: Check) -> None:
    def rename(groups: Any) -> None:
        groups["slurm_contoller"] = groups.pop("slurm_controller")
        del groups["slurm"]["children"]["slurm_controller"], groups["lab_nodes"]["children"]["slurm_controller"]

    assert check(hosts=rename) == [
        "group slurm_controller (SLURM controllers, the primary first): missing: "
        "rename slurm_contoller, if that is a misspelling"
    ]


def test_a_missing_group_is_reported_with_what_cannot_be_evaluated_without_it(check: Check) -> None:
    def remove(groups: Any) -> None:
        del groups["registry"], groups["lab_nodes"]["children"]["registry"]
        groups["image_builder"]["hosts"]["svc1"] = {"ansible_host": "10.203.77.31"}

    found = check(hosts=remove)
    assert (
        found[0]
        == "group registry (the host of the image registry): missing: add it; leave it empty if there are no such hosts"
    )
    assert found[1].startswith("ictx_registry (all hosts): cannot be evaluated: ")
    assert len(found) == 2


def test_an_empty_group_that_needs_hosts_is_named(check: Check) -> None:
    def empty(groups: Any) -> None:
        groups["image_builder"] = None

    assert "group image_builder (the host that builds images): has 0 hosts, needs at least 1" in check(hosts=empty)


def test_a_second_registry_is_refused(check: Check) -> None:
    def add(groups: Any) -> None:
        groups["registry"]["hosts"]["n1"] = None

    assert "group registry (the host of the image registry): has 2 hosts (svc1, n1), may have at most 1" in check(
        hosts=add
    )


def test_a_compute_node_that_is_in_no_group_of_slurm_is_named(check: Check) -> None:
    def forget(groups: Any) -> None:
        del groups["slurm"]["children"]["slurm_compute"]

    assert "group slurm (every host of SLURM) (n1, n2): must contain all hosts of slurm_compute" in check(hosts=forget)


def test_central_logs_need_a_host_that_keeps_them(check: Check) -> None:
    def empty(groups: Any) -> None:
        groups["prometheus"] = None

    assert check(hosts=empty) == ["ictx_logs (all hosts): journal needs a host in the group prometheus"]
