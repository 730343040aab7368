#!/usr/bin/python
"""Ansible module: creates folders and files and removes others in one run; validates all before replacing any."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: install_files
short_description: Creates folders and text files, and removes others, in one run
description:
  - Replaces loops of P(ansible.builtin.file#module), P(ansible.builtin.template#module) and
    P(ansible.builtin.copy#module) with one start of Python on the node and no partial state. All files are written
    next to their destinations, with owners and modes, and validated; only then do they replace the existing ones.
  - Folders are created first, removals come last. Check mode needs neither the folders nor the validating programs.
options:
  folders:
    description: Folders to create, each a path or a dictionary. Parents are created too, with mode 0755.
    type: list
    elements: raw
    default: []
    suboptions:
      path: {type: path, required: true}
      owner: {type: str, default: root}
      group: {type: str, default: root}
      mode: {type: str, default: "0755"}
  files:
    description: Text files in UTF-8. The action takes RV(content) from one of O(files[].template) and O(files[].src).
    type: list
    elements: dict
    default: []
    suboptions:
      dest: {type: path, required: true}
      template: {type: path, description: "Template of the role, or of the playbook."}
      vars: {type: dict, default: {}, description: Variables of this template alone.}
      src: {type: path, description: "File of the role, of the playbook, or of the control host."}
      content: {type: str, description: "The text itself."}
      owner: {type: str, default: root}
      group: {type: str, default: root}
      mode: {type: str, default: "0644"}
      validate: {type: str, description: "Command that must accept the file, whose path stands for %s."}
  absent:
    description: Files to remove.
    type: list
    elements: path
    default: []
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Configure the exporter
  install_files:
    folders: [/etc/prometheus]
    files:
      - {template: default.j2, dest: /etc/default/prometheus-node-exporter}
      - {template: web.yml.j2, dest: /etc/prometheus/web.yml, group: prometheus, mode: "0640"}
    absent: [/etc/prometheus/old.yml]
  notify: Restart the exporter
"""

RETURN = r"""
changes: {type: list, elements: path, description: Paths that are new, different or removed., returned: always}
"""

RIGHTS = {"owner": {"default": "root"}, "group": {"default": "root"}}
FOLDER = RIGHTS | {"path": {"type": "path", "required": True}, "mode": {"default": "0755"}}
FILE = RIGHTS | {
    "dest": {"type": "path", "required": True},
    "content": {"required": True},
    "mode": {"default": "0644"},
    "validate": {},
}


class Module(AnsibleModule):
    """A module that logs no file contents to the node's journal, since they may be secrets.

    AnsibleModule's `no_log` does not work for that: the task's own setting, off by default, overrides it.
    """

    def _log_invocation(self) -> None:
        """Logs only the paths instead of all parameters."""
        paths = [*(entry["dest"] for entry in self.params["files"]), *self.params["absent"]]
        self.log(f"Invoked for {len(self.params['folders'])} folders and {', '.join(paths) or 'no file'}")


def make(folder: str) -> None:
    """Creates a folder and its missing parents, with mode 0755 whatever the umask."""
    parent = os.path.dirname(folder)
    if not os.path.isdir(parent):
        make(parent)
    os.mkdir(folder)
    os.chmod(folder, 0o755)


class Installation:
    """One run of the module; `undo` always removes temporary files."""

    def __init__(self, module: AnsibleModule, undo: ExitStack) -> None:
        self.module, self.undo = module, undo
        self.changes: list[str] = []
        self.diffs: list[dict[str, Any]] = []

    def changed(self, path: str, before: bytes | None = None, after: str = "") -> None:
        """Records a changed path once, with its content before and after."""
        if path not in self.changes:
            self.changes.append(path)
            shown = (before or b"").decode(errors="replace")
            self.diffs.append({"before_header": path, "after_header": path, "before": shown, "after": after})

    def rights(self, path: str, entry: dict[str, Any]) -> bool:
        """Sets a path's owner, group and mode; returns whether they changed."""
        wanted = self.module.load_file_common_arguments(entry | {"path": path, "attributes": None}, path=path)
        return bool(self.module.set_fs_attributes_if_different(wanted, False))

    def folder(self, entry: dict[str, Any]) -> None:
        """Creates a folder."""
        path = entry["path"]
        if os.path.lexists(path) and not os.path.isdir(path):
            self.module.fail_json(msg=f"{path} is not a folder: move it away", path=path)
        new = not os.path.isdir(path)
        if new and not self.module.check_mode:
            make(path)
        if (self.module.check_mode and new) or self.rights(path, entry) or new:
            self.changed(path)

    def present(self, dest: str) -> bytes | None:
        """Returns a file's content; None if it is missing, or a link or pipe, which is replaced without reading it."""
        if os.path.isdir(dest):
            self.module.fail_json(msg=f"{dest} is a folder: move it away", path=dest)
        if os.path.islink(dest) or not os.path.isfile(dest):
            return None
        with open(dest, "rb") as file:
            return file.read()

    def stage(self, entry: dict[str, Any]) -> str:
        """Returns the path of a validated new file next to its destination, with owner and mode."""
        dest = entry["dest"]
        try:
            handle, path = tempfile.mkstemp(prefix=".ictx-", dir=os.path.dirname(dest))
        except FileNotFoundError:
            self.module.fail_json(msg=f"{os.path.dirname(dest)} does not exist: list it under folders", path=dest)
        self.undo.callback(lambda: os.path.exists(path) and os.unlink(path))
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(entry["content"])
        self.rights(path, entry)
        if entry["validate"]:
            command = entry["validate"].replace("%s", path)
            status, out, err = self.module.run_command(command)
            if status:
                self.module.fail_json(
                    msg=f"{dest} was not changed, because its new content is not valid: {(err or out).strip()}",
                    path=dest,
                    command=command,
                    rc=status,
                )
        return path

    def files(self, entries: list[dict[str, Any]]) -> None:
        """Replaces the files that differ, after all of them are valid."""
        staged: dict[str, str] = {}
        for entry in entries:
            dest, before = entry["dest"], self.present(entry["dest"])
            if before != entry["content"].encode():
                self.changed(dest, before, entry["content"])
                if not self.module.check_mode:
                    staged[dest] = self.stage(entry)
            elif self.rights(dest, entry):
                self.changed(dest)
        for dest, path in staged.items():
            os.replace(path, dest)
            self.module.set_default_selinux_context(dest, False)

    def remove(self, path: str) -> None:
        """Removes a file."""
        if os.path.lexists(path):
            self.changed(path, self.present(path))
            if not self.module.check_mode:
                os.unlink(path)


def main() -> None:
    """Runs the module."""
    module = Module(
        {
            "folders": {"type": "list", "elements": "dict", "default": [], "options": FOLDER},
            "files": {"type": "list", "elements": "dict", "default": [], "options": FILE},
            "absent": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    with ExitStack() as undo:
        done = Installation(module, undo)
        for entry in module.params["folders"]:
            done.folder(entry)
        done.files(module.params["files"])
        for path in module.params["absent"]:
            done.remove(path)
        shown = {"diff": done.diffs} if module._diff else {}
        module.exit_json(changed=bool(done.changes), changes=done.changes, **shown)


if __name__ == "__main__":
    main()
