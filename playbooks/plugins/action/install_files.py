"""Ansible action of install_files: renders templates, reads files of the control host, and sends all texts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import lookup_loader

SOURCES = ("template", "src", "content")


class ActionModule(ActionBase):
    """See the module's DOCUMENTATION."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the module's result."""
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        arguments = dict(self._task.args)
        arguments["folders"] = [
            {"path": entry} if isinstance(entry, str) else entry for entry in arguments.get("folders") or []
        ]
        arguments["files"] = [self._complete(dict(entry), variables) for entry in arguments.get("files") or []]
        # Not a fixed name: it is different in a collection.
        result.update(self._execute_module(self._task.action, module_args=arguments, task_vars=variables))
        # With -v, the content of all files would clutter the output.
        result.pop("invocation", None)
        return result

    def _complete(self, entry: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Returns a file's entry with its source replaced by the content."""
        given = [name for name in SOURCES if entry.get(name) is not None]
        dest = entry.get("dest", "an entry without dest")
        if len(given) != 1:
            raise AnsibleActionFail(f"{dest}: exactly one of {', '.join(SOURCES)} is required, got {given or 'none'}")
        source, own = entry.pop(given[0]), dict(entry.pop("vars", {}))
        if given[0] == "template":
            source = self._rendered(source, own, variables)
        elif given[0] == "src":
            source = Path(self._find_needle("files", source)).read_text(encoding="utf-8")
        return entry | {"content": source}

    def _rendered(self, name: str, own: dict[str, Any], variables: dict[str, Any]) -> str:
        """Returns a template's text, as ansible.builtin.template renders it."""
        lookup = lookup_loader.get("ansible.builtin.template", loader=self._loader, templar=self._templar)
        given = variables | {"ansible_search_path": self._task.get_search_path()} | own
        (text,) = lookup.run([name], variables=given)
        return str(text)
