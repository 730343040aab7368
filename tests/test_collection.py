"""The roles work from another repository: as an installed collection, without this repository's ansible.cfg."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ansible_collections.ansible.posix as installed
import pytest
import yaml
from cluster import ROOT
from programs import loaded

collection = loaded(ROOT / "scripts/collection")
TOOLS = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- name: x\n  install_files:\n    files: []\n", "- name: x\n  ictx.platform.install_files:\n    files: []\n"),
        ("{{ a | in_url }}", "{{ a | ictx.platform.in_url }}"),
        ("{{ a|in_url|lower }}", "{{ a|ictx.platform.in_url|lower }}"),
        ("{{ a | map('in_url') | list }}", "{{ a | map('ictx.platform.in_url') | list }}"),
        # Neither names of variables nor keys that only begin with a module's name.
        ("install_files_done: true\nin_url: x", "install_files_done: true\nin_url: x"),
        ("{{ a | in_urls }} || in_url", "{{ a | in_urls }} || in_url"),
        ("{{ a | ictx.platform.in_url }}", "{{ a | ictx.platform.in_url }}"),
    ],
)
def test_modules_and_filters_get_their_full_names(text: str, wanted: str) -> None:
    assert collection.qualified(text, {"install_files"}, {"in_url"}) == wanted


def test_requirements_name_what_the_locked_package_brings() -> None:
    entries = yaml.safe_load((ROOT / "requirements/collections.yml").read_text())["collections"]
    root = Path(next(iter(installed.__path__))).parents[1]
    for entry in entries:
        about = json.loads((root / entry["name"].replace(".", "/") / "MANIFEST.json").read_text())
        assert about["collection_info"]["version"] == entry["version"], entry["name"]
    texts = " ".join(path.read_text() for folder in ("roles", "playbooks") for path in (ROOT / folder).rglob("*.yml"))
    used = set(re.findall(r"^\s*(?:- )?((?!ansible\.builtin)[a-z]+\.[a-z]+)\.[a-z_0-9]+:(?:\s|$)", texts, re.MULTILINE))
    assert used <= {entry["name"] for entry in entries}


PLAY = """
- hosts: localhost
  gather_facts: false
  tasks:
    - name: Create an authority and a certificate with a role, its handlers and a module that lay in another role
      ansible.builtin.include_role: {name: ictx.platform.certificate_authority, tasks_from: "{{ item }}"}
      loop: [main, local]
      vars:
        certificate_authority_dir: FOLDER/ca
        certificate_authority_local_name: web
        certificate_authority_names: [web]
    - name: Use a module with its action, and a filter
      ictx.platform.install_files:
        files: [{dest: FOLDER/url, content: "{{ 'fd00::1' | ictx.platform.in_url }}", mode: "0600"}]
    - name: Parse a role that calls others
      ansible.builtin.import_role: {name: ictx.platform.host_certificate}
      when: false
"""


@pytest.mark.full
def test_a_play_of_another_repository_uses_the_installed_collection(tmp_path: Path) -> None:
    config = tmp_path / "ansible.cfg"
    config.write_text("[defaults]\n")

    def run(*command: object) -> str:
        environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "ANSIBLE_CONFIG": str(config)}
        environment["ANSIBLE_COLLECTIONS_PATH"] = str(tmp_path / "installed")
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    archive = run(sys.executable, ROOT / "scripts/collection", tmp_path / "built").strip()
    run("ansible-galaxy", "collection", "install", "--no-deps", "--collections-path", tmp_path / "installed", archive)
    play = tmp_path / "play.yml"
    play.write_text(PLAY.replace("FOLDER", str(tmp_path)))
    interpreter = f"ansible_python_interpreter={sys.executable}"
    command = ("ansible-playbook", "-i", "localhost,", "-c", "local", "-e", interpreter, play)
    run(*command, "--syntax-check")
    assert "failed=0" in run(*command)
    assert (tmp_path / "url").read_text() == "[fd00::1]"
    verified = ["openssl", "verify", "-CAfile", tmp_path / "ca/ca.crt", tmp_path / "ca/issued/web.crt"]
    subprocess.run(verified, check=True, capture_output=True)
    roles = tmp_path / "installed/ansible_collections/ictx/platform/roles"
    assert "| `registry_port` | int | `5000` | Port" in (roles / "registry/README.md").read_text()
    # Every role can be found and parsed, not only the roles of the play.
    parse = [{"hosts": "localhost", "tasks": [
        {"ansible.builtin.import_role": {"name": f"ictx.platform.{role.name}"}, "when": False}
        for role in sorted(roles.iterdir())
    ]}]  # fmt: skip
    play.write_text(yaml.safe_dump(parse))
    run(*command, "--syntax-check")
