"""The callback `preload` loads the plug-ins that the playbooks use before Ansible forks its workers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = (ROOT / "playbooks/plugins/callback/preload.py").read_text()
SOURCES = [
    path
    for folder in ("roles", "playbooks", "inventories")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".yml", ".j2"}
]

PLAYBOOK = """
- name: Use a filter
  hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - name: Use a filter of a collection
      ansible.builtin.debug: {msg: "{{ '192.0.2.1' | ansible.utils.ipaddr }}"}
"""
WATCH = """
import sys
from multiprocessing import parent_process
from ansible.plugins import loader
from ansible.cli.playbook import PlaybookCLI
load = loader.PluginLoader._load_module_source
def watched(self, *, python_module_name, path):
    if python_module_name not in sys.modules:
        with open(sys.argv[2], "a") as log:  # A fork has no standard output.
            print("fork" if parent_process() else "parent", python_module_name, file=log)
    return load(self, python_module_name=python_module_name, path=path)
loader.PluginLoader._load_module_source = watched
PlaybookCLI.cli_executor(["ansible-playbook", "-i", "localhost,", sys.argv[1]])
"""


def test_every_filter_of_a_collection_and_every_lookup_in_use_is_loaded_beforehand() -> None:
    text = "\n".join(path.read_text() for path in SOURCES)
    collections = {name.rsplit(".", 1)[0] for name in re.findall(r"\|\s*([a-z]+\.[a-z]+\.[a-z_]+)", text)}
    for collection in sorted(collections - {"ansible.builtin"}):
        assert f'"{collection}.' in PLUGIN, f"add the filters of {collection} to FILTERS of the callback"
    lookups = set(re.findall(r"(?:lookup|query)\('(?:ansible\.builtin\.)?([a-z]+)'", text))
    assert {"env", "file"} <= lookups
    for lookup in sorted(lookups):
        assert f'"{lookup}"' in PLUGIN, f"add {lookup} to LOOKUPS of the callback"


def test_a_task_imports_no_filter(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    log = tmp_path / "loaded"
    command = [sys.executable, "-c", WATCH, str(tmp_path / "play.yml"), str(log)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = [line.split() for line in log.read_text().splitlines()]
    assert any(where == "parent" and name.startswith("ansible.plugins.filter.core") for where, name in loaded)
    assert [name for where, name in loaded if where == "fork"] == []
