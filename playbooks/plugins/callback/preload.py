"""Loads the plugins that tasks use before the first task, in the process that the workers are forked from.

Ansible runs each task of each host in a fork. What a fork imports (mainly filters and their libraries), the next fork
imports again, which takes most of the CPU time of a run without changes (docs/testing.md).
"""

from __future__ import annotations

import gc
from typing import Any

from ansible.plugins import loader
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: preload
type: aggregate
short_description: loads filters, tests, lookups and connections once, before workers are forked
description:
  - Saves CPU time; has no other effect.
"""

# The plugins used most. Loading one filter of a collection loads all of them.
FILTERS = ("ansible.utils.ipaddr", "community.general.dict")
LOOKUPS = ("env", "file", "fileglob", "password", "pipe", "template", "vars")
ACTIONS = ("normal", "assert", "command", "copy", "debug", "include_vars", "set_fact", "template", "uri")
CONNECTIONS = ("local", "ssh")


class CallbackModule(CallbackBase):
    """Loads plugins when a playbook starts; prints nothing."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "preload"
    CALLBACK_NEEDS_ENABLED = True

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Loads the plugins, then freezes the garbage collector so that forks keep sharing the memory."""
        for loaded in (loader.filter_loader, loader.test_loader):
            list(loaded.all())
        for name in FILTERS:
            loader.filter_loader.get(name)
        for plugins, names in (
            (loader.lookup_loader, LOOKUPS),
            (loader.action_loader, ACTIONS),
            (loader.connection_loader, CONNECTIONS),
        ):
            for name in names:
                plugins.get(name, class_only=True)
        loader.shell_loader.get("sh")
        gc.collect()
        gc.freeze()
