"""The command line: `ictx pull`, `ictx promote`, `ictx register`, `ictx adapters`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ictx.errors import UserError, printable
from ictx.settings import config_path

POLICY = "promote.yaml"
REFUSED = 3
"""Exit status if the policy rejects a version; the alias is not changed."""

PULL_EXAMPLES = """
Uses MLflow's variables MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. The folder
is created only when it is complete and verified; an interrupted pull resumes.

examples:
  ictx pull models:/ictx-tiny@champion --to /models/ictx-tiny/champion
  ictx pull models:/ictx-tiny/3 --to /models/ictx-tiny/3
  ictx pull models:/ictx-tiny@champion --to /models/ictx-tiny/champion --promoted    # like the server
"""
PROMOTE_EXAMPLES = """
Compares the version's `ictx eval` results with the policy and with the alias's current version; if the policy rejects
the version, the alias is not changed (status 3). Verifies the version's files with the checksums that the job logged,
and records the checksums in a tag that only promoters (ictx_promoters in the inventory) can write, so that files
modified later are not served.

examples:
  ictx promote 3 --alias champion
  ictx promote 3 --alias champion --policy my-policy.yaml
  ictx promote 2 --alias champion --force --reason 'version 3 fails in production'
  ictx promote candidate --alias champion --model ictx-tiny    # the version of another alias
"""
REGISTER_EXAMPLES = """
examples:
  ictx eval judge-model --out judge && ictx register judge --model ictx-judge
  ictx register runs/support/adapter --model ictx-1b-support        # the adapter of a run with train.lora
"""
ADAPTERS_EXAMPLES = """
The list has lines NAME: models:/MODEL@ALIAS (or /VERSION) and is read again in each pass. The chart runs this beside
vLLM, with a list generated from `adapters.serve`.

examples:
  ictx adapters --list adapters.yaml --to /adapters --base /models/ictx-1b/3 --state /run/ictx
  ictx adapters --list adapters.yaml --to /adapters --base /models/ictx-1b/3 --state /run/ictx --once
"""


def register(areas: Any) -> None:
    """Adds the commands to `ictx`."""
    raw = argparse.RawDescriptionHelpFormatter
    other = areas.add_parser(
        "register",
        help="register a folder with a model as a new version",
        epilog=REGISTER_EXAMPLES,
        formatter_class=raw,
    )
    other.add_argument("folder", type=Path, metavar="FOLDER", help="model or adapter in Hugging Face format")
    other.add_argument("--model", required=True, help="registered model; created if missing")
    other.add_argument("--alias", default="candidate", help="alias to set on the version (default: candidate)")
    other.set_defaults(run=run_register)
    _register_adapters(areas)
    pull = areas.add_parser(
        "pull", help="download and verify a registered model", epilog=PULL_EXAMPLES, formatter_class=raw
    )
    pull.add_argument("uri", help="models:/<name>@<alias> or models:/<name>/<version>")
    pull.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="target folder")
    pull.add_argument(
        "--promoted",
        action="store_true",
        default=os.environ.get("ICTX_PROMOTED_ONLY") == "true",
        help="reject a version that was not promoted (also: ICTX_PROMOTED_ONLY=true)",
    )
    pull.set_defaults(run=run_pull)

    promote = areas.add_parser(
        "promote",
        help="verify a registered version and point an alias to it",
        epilog=PROMOTE_EXAMPLES,
        formatter_class=raw,
    )
    promote.add_argument("version", help="version number, or another alias of it")
    promote.add_argument("--alias", required=True, help="alias to set on the version, such as champion")
    promote.add_argument("--model", default="", help="registered model; required if there are several")
    promote.add_argument(
        "--policy",
        default=POLICY,
        metavar="FILE",
        help=f"promotion policy: a path, or a name below the shipped configs (default: {POLICY})",
    )
    promote.add_argument("--force", action="store_true", help="promote a version that the policy rejects")
    promote.add_argument(
        "--reason", default="", metavar="TEXT", help="reason for --force, recorded in the version's tags"
    )
    promote.set_defaults(run=run_promote)


def _register_adapters(areas: Any) -> None:
    adapters = areas.add_parser(
        "adapters",
        help="load and unload LoRA adapters of a running vLLM according to a list",
        epilog=ADAPTERS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    adapters.add_argument(
        "--list", type=Path, required=True, metavar="FILE", dest="list_file", help="adapters to serve"
    )
    adapters.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder for the adapters' files")
    adapters.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="folder of the served base model")
    adapters.add_argument(
        "--state", type=Path, required=True, metavar="FOLDER", help="folder for the key (the server's ICTX_ADMIN)"
    )
    adapters.add_argument(
        "--server", default="http://127.0.0.1:8000", metavar="URL", help="vLLM (default: %(default)s)"
    )
    adapters.add_argument("--certificate", type=Path, metavar="FILE", help="the server's certificate, if it uses HTTPS")
    adapters.add_argument("--rank", type=int, metavar="R", help="the server's --max-lora-rank")
    adapters.add_argument("--seconds", type=float, default=10.0, help="interval between passes (default: 10)")
    adapters.add_argument("--once", action="store_true", help="run one pass; exit status 1 if an adapter is not loaded")
    adapters.add_argument(
        "--promoted",
        action="store_true",
        default=os.environ.get("ICTX_PROMOTED_ONLY") == "true",
        help="reject a version that was not promoted (also: ICTX_PROMOTED_ONLY=true)",
    )
    adapters.set_defaults(run=run_adapters)


def run_adapters(arguments: argparse.Namespace) -> int:
    """Runs `ictx adapters`."""
    from ictx.registry import new_client
    from ictx.serve.adapters import Adapters, Server
    from ictx.serve.gate import ADMIN_KEY

    server = Server(arguments.server.rstrip("/"), arguments.state / ADMIN_KEY, arguments.certificate)
    adapters = Adapters(
        new_client(),
        server,
        arguments.list_file,
        arguments.to,
        arguments.base,
        arguments.state,
        promoted=arguments.promoted,
        rank=arguments.rank,
    )
    if arguments.once:
        if not server.key_file.is_file():
            adapters.open()
        return 0 if adapters.update() else 1
    # PID 1 of a container ignores SIGTERM unless it has a handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    adapters.open()
    adapters.follow(arguments.seconds)
    return 0


def run_register(arguments: argparse.Namespace) -> int:
    """Runs `ictx register`."""
    from ictx.registry import explained
    from ictx.serve.register import register

    with explained():
        print(register(arguments.folder, arguments.model, arguments.alias))
    return 0


def run_pull(arguments: argparse.Namespace) -> int:
    """Runs `ictx pull`."""
    from ictx.registry import ModelRef, explained, new_client
    from ictx.serve.pull import pull

    with explained():
        pull(new_client(), ModelRef.parse(arguments.uri), arguments.to, arguments.promoted)
    return 0


def run_promote(arguments: argparse.Namespace) -> int:
    """Runs `ictx promote`."""
    reason = " ".join(arguments.reason.split())
    if arguments.force != bool(reason):
        raise UserError("--force and --reason must be used together: the reason is recorded in the version's tags")
    from ictx.registry import explained, new_client
    from ictx.serve.policy import Policy, Refused
    from ictx.serve.promote import promote

    policy = Policy.read(config_path(arguments.policy))
    try:
        with explained():
            print(promote(new_client(), arguments.version, arguments.alias, arguments.model, policy, reason))
    except Refused as refusal:
        print(f"ictx: {printable(str(refusal))}", file=sys.stderr)
        return REFUSED
    return 0
