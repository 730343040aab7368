#!/usr/bin/python
"""Ansible module: attaches a file to an image in its registry."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import Request, urlopen

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: registry_attachment
short_description: Attaches a file to an image in its registry
description:
  - Pushes an OCI image of one layer, the file, under the tag C(sha256-DIGEST.SUFFIX), where cosign looks for it.
options:
  ca_file: {type: path, description: CA certificate of the registry (default - the host's trusted CAs).}
  content: {type: str, required: true, description: The file.}
  digest: {type: str, required: true, description: "Digest of the image, C(sha256:…)."}
  media_type: {type: str, required: true, description: Media type of the file.}
  password: {type: str, required: true, description: Password at the registry.}
  registry: {type: str, required: true, description: "Registry, C(HOST:PORT)."}
  repository: {type: str, required: true, description: Repository of the image.}
  suffix: {type: str, required: true, description: Suffix of the tag after the digest.}
  user: {type: str, required: true, description: User at the registry; no login if empty.}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Push the SBOM of the image
  registry_attachment:
    registry: registry.example:5000
    repository: ictx/training
    digest: sha256:…
    suffix: sbom
    media_type: application/vnd.cyclonedx+json
    content: "{{ sbom }}"
    ca_file: /etc/ictx/tls/ca.crt
    user: ictx
    password: "{{ password }}"
"""

RETURN = r"""
tag: {type: str, returned: success, description: Tag of the file.}
"""

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


def digest_of(content: bytes) -> str:
    """Returns a digest as registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    """A repository in a registry."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._base = f"https://{options['registry']}/v2/{options['repository']}/"
        credentials = base64.b64encode(f"{options['user']}:{options['password']}".encode()).decode()
        self._headers = {"Authorization": f"Basic {credentials}"} if options["user"] else {}
        self._context = ssl.create_default_context(cafile=options["ca_file"])

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        """Returns the response headers, `None` if a HEAD request finds nothing."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = Request(urljoin(self._base, path), data=body, method=method, headers={**self._headers, **named})
        try:
            with urlopen(request, context=self._context, timeout=60) as answer:
                return answer.headers
        except HTTPError as error:
            if error.code == 404 and method == "HEAD":
                return None
            raise

    def push(self, content: bytes) -> str:
        """Pushes a blob unless it exists, and returns its digest."""
        digest = digest_of(content)
        if self.call("HEAD", f"blobs/{digest}") is None:
            place = urljoin(self._base, self.call("POST", "blobs/uploads/", b"")["Location"])
            sign = "&" if urlsplit(place).query else "?"
            self.call(
                "PUT", f"{place}{sign}{urlencode({'digest': digest})}", content, Content_Type="application/octet-stream"
            )
        return digest


def describe(content: bytes, media_type: str) -> dict[str, Any]:
    """Returns the descriptor of a blob."""
    return {"mediaType": media_type, "size": len(content), "digest": digest_of(content)}


def attach(options: dict[str, Any], check_mode: bool) -> tuple[bool, str]:
    """Pushes the file; returns whether it was pushed, and its tag."""
    registry, content = Registry(options), options["content"].encode()
    config = json.dumps(
        {"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers", "diff_ids": [digest_of(content)]}}
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": describe(config, CONFIG),
            "layers": [describe(content, options["media_type"])],
        }
    ).encode()
    tag = f"{options['digest'].replace(':', '-')}.{options['suffix']}"
    present = registry.call("HEAD", f"manifests/{tag}", Accept=MANIFEST)
    if present is not None and present["Docker-Content-Digest"] == digest_of(manifest):
        return False, tag
    if not check_mode:
        registry.push(config)
        registry.push(content)
        registry.call("PUT", f"manifests/{tag}", manifest, Content_Type=MANIFEST)
    return True, tag


def main() -> None:
    """Runs the module."""
    names = ("content", "digest", "media_type", "registry", "repository", "suffix", "user")
    module = AnsibleModule(
        argument_spec={
            **{name: {"type": "str", "required": True} for name in names},
            "ca_file": {"type": "path"},
            "password": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    try:
        changed, tag = attach(module.params, module.check_mode)
    except (HTTPError, URLError, OSError) as error:
        module.fail_json(msg=f"{module.params['registry']}/{module.params['repository']}: {error}")
    module.exit_json(changed=changed, tag=tag)


if __name__ == "__main__":
    main()
