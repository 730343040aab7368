"""Ansible filter: a node's kubeconfig, as the control host may use it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

import yaml
from ansible.errors import AnsibleFilterError

CLUSTER = ("certificate-authority-data",)
USER = ("client-certificate-data", "client-key-data")


def plain_kubeconfig(text: str, server: str) -> str:
    """Returns a kubeconfig for an address with the certificates of another, and nothing else of it.

    A kubeconfig may name programs that whoever uses it runs (`exec`), files that are read, and other servers. A node
    decides none of that for the control host. Raises AnsibleFilterError.
    """
    try:
        found = yaml.safe_load(text)
        cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
        parts = [{name: encoded(each[name]) for name in names} for each, names in ((cluster, CLUSTER), (user, USER))]
    except (yaml.YAMLError, LookupError, TypeError, ValueError, binascii.Error) as error:
        raise AnsibleFilterError(f"plain_kubeconfig: certificates are missing or cannot be read: {error!r}") from error
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "ictx", "cluster": {"server": str(server), **parts[0]}}],
        "users": [{"name": "admin", "user": parts[1]}],
        "contexts": [{"name": "ictx", "context": {"cluster": "ictx", "user": "admin"}}],
        "current-context": "ictx",
    }
    return str(yaml.safe_dump(made, sort_keys=False))


def encoded(data: Any) -> str:
    """Returns base64 as it is. Raises ValueError for anything else."""
    base64.b64decode(data, validate=True)
    return str(data)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {"plain_kubeconfig": plain_kubeconfig}
