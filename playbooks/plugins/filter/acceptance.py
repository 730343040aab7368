"""Ansible filters: compare the measurements of playbooks/validate.yml with the inventory's thresholds."""

from __future__ import annotations

import base64
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

Check = dict[str, Any]
"""`node`, `check`, `value`, `unit`, `threshold`, `passed` (None without a threshold) and `note`."""

# Default thresholds, which ictx_validate overrides. Those that depend on the hardware have no default.
DEFAULTS = {
    "clock_ms": 50.0,
    "failed_connections": 0.0,
    "pair_share": 0.7,
    "kernel_share": 0.85,
}


def check(
    node: str,
    name: str,
    value: float | None,
    unit: str,
    least: float | None = None,
    most: float | None = None,
    note: str = "",
) -> Check:
    """Returns one line of the report; a check with a threshold but no value fails."""
    threshold = least if least is not None else most
    if threshold is None:
        passed = None
    elif value is None:
        passed = False
    else:
        passed = value >= threshold if least is not None else value <= threshold
    bound = "" if threshold is None else f"{'≥' if least is not None else '≤'} {threshold:g}"
    return {
        "node": node, "check": name, "value": value, "unit": unit, "threshold": bound, "passed": passed, "note": note,
    }  # fmt: skip


def state(node: str, name: str, problem: str) -> Check:
    """Returns a line for a check without a value."""
    return {
        "node": node, "check": name, "value": None, "unit": "", "threshold": "", "passed": not problem, "note": problem,
    }  # fmt: skip


def of_node(node: str, found: Mapping[str, Any] | None, wanted: Mapping[str, float]) -> Iterator[Check]:
    """Yields the checks of a node's measurements (module measure_node); None if it is unreachable."""
    if found is None:
        yield state(node, "reachable", "unreachable, or the measurement failed")
        return
    for folder, disk in found["disks"].items():
        if "problem" in disk:
            yield state(node, f"disk {folder}", disk["problem"])
            continue
        for way in ("write", "read"):
            note = ", ".join(filter(None, (disk["tool"], disk.get("note"))))
            yield check(
                node, f"{way} {folder}", disk[way] / 1e6, "MB/s", least=wanted.get(f"disk_{way}_mb_s"), note=note
            )
    for peer, way in found["peers"].items():
        yield check(
            node, f"connections to {peer} that failed", way["failed"], f"of {way['tries']}",
            most=wanted["failed_connections"], note=way.get("problem", ""),
        )  # fmt: skip
        trip = way["round_trip"] * 1e3 if "round_trip" in way else None
        yield check(node, f"round trip to {peer}", trip, "ms", most=wanted.get("round_trip_ms"))
    if "offset" in found["clock"]:
        yield check(node, "clock, by chrony", abs(found["clock"]["offset"]) * 1e3, "ms", most=wanted["clock_ms"])


def of_links(links: Mapping[str, Any], wanted: Mapping[str, float]) -> Iterator[Check]:
    """Yields the checks of the results of `ictx bench links`."""
    absolute, whole = wanted.get("pair_gb_s"), f"{len(links['nodes'])} nodes"
    yield check(
        whole, f"all-reduce of all, {links['backend']}", links["together"] / 1e9, "GB/s", least=wanted.get("all_gb_s")
    )
    for node, found in links["inside"].items():
        yield check(node, "all-reduce inside", found / 1e9, "GB/s", least=wanted.get("inside_gb_s"))
    usual = statistics.median(found for _, _, found in links["pairs"]) if links["pairs"] else 0.0
    for one, other, found in links["pairs"]:
        # The higher threshold: if all pairs are slow, each of them is close to the median.
        least = max(absolute or 0.0, wanted["pair_share"] * usual / 1e9)
        yield check(f"{one} {other}", "all-reduce of the pair", found / 1e9, "GB/s", least=round(least, 3))
    for node, (offset, bound) in links["clocks"].items():
        note = f"± {bound * 1e3:.3f} ms"
        yield check(
            node,
            f"clock, beside {links['nodes'][0]}'s",
            max(abs(offset) - bound, 0.0) * 1e3,
            "ms",
            most=wanted["clock_ms"],
            note=note,
        )


def of_kernels(outputs: Mapping[str, str], wanted: Mapping[str, float]) -> Iterator[Check]:
    """Yields the checks of `ictx kernels bench`'s output by NODE-GPU: rates, also relative to equal GPUs' median."""
    rates: dict[str, dict[str, tuple[float, str]]] = {}
    models = {}
    for name, text in outputs.items():
        found = re.search(r"^copy ([\d.]+) TB/s, bfloat16 product ([\d.]+) TFLOP/s", text, re.MULTILINE)
        if not found:
            last = (text.strip().splitlines() or ["printed nothing"])[-1]
            yield state(name, "kernels", last[:200])
            continue
        rates[name] = {"copy": (float(found[1]), "TB/s"), "product": (float(found[2]), "TFLOP/s")}
        models[name] = text.partition(",")[0].splitlines()[-1]
    for name, own in rates.items():
        for what, (value, unit) in own.items():
            usual = statistics.median(rates[other][what][0] for other in rates if models[other] == models[name])
            least = max(wanted.get(f"{what}_{unit.lower().replace('/', '_')}", 0.0), wanted["kernel_share"] * usual)
            yield check(name, what, value, unit, least=round(least, 3), note=models[name])


def job_found(host: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the job's results for `acceptance`, from the variables of the controller that submitted it.

    These are the registered `validate_job` and `validate_found`, and `validate_out`: why nodes are out of service.
    """
    done: dict[str, Any] = {"out": host.get("validate_out") or {}}
    job = host.get("validate_job") or {}
    # A skipped task has no exit status.
    if "rc" not in job:
        return done
    files = {
        PurePath(one["item"]): base64.b64decode(one["content"]).decode(errors="replace")
        for one in (host.get("validate_found") or {}).get("results", [])
        if "content" in one
    }
    done["kernels"] = {path.stem: text for path, text in files.items() if path.parent.name == "kernels"}
    done["links"] = next((json.loads(text) for path, text in files.items() if path.name == "links.json"), {})
    log = next((text.strip().splitlines()[-3:] for path, text in files.items() if path.suffix == ".log"), [])
    done["problem"] = "" if job["rc"] == 0 else "; ".join([*job.get("stderr", "").splitlines(), *log]) or "failed"
    return done


def out_of_service(states: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the reasons of the nodes in `node_states` on which no job can start."""
    return {
        name: f"{'+'.join(node['flags'])}: {node['reason'] or 'no reason'}"
        for name, node in states.items()
        if {"DRAIN", "DOWN", "FAIL", "NOT_RESPONDING"} & set(node["flags"])
    }


def acceptance(
    measured: Mapping[str, Mapping[str, Any] | None],
    job: Mapping[str, Any],
    pods: Mapping[str, str],
    thresholds: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the report: `passed`, `failures` as text, `checks`, `links`, and the `cells` of their chart.

    Args:
        measured: result of the module measure_node by node; None for an unreachable node.
        job: results of the job on SLURM's nodes: `links` as `ictx bench links` saves them, `kernels` (output of `ictx
        kernels bench` by NODE-GPU), `problem` (why it failed, if it ran), and `out` (why nodes are out of service).
        pods: the pod's error by Kubernetes node; empty if it succeeded.
        thresholds: the inventory's ictx_validate; keys as in DEFAULTS and inventory_schema.yml.
    """
    wanted = {**DEFAULTS, **{name: float(value) for name, value in thresholds.items() if name != "disks"}}
    checks = [line for node, found in measured.items() for line in of_node(node, found, wanted)]
    checks += [state(node, "in service", reason) for node, reason in job.get("out", {}).items()]
    if "problem" in job:
        checks.append(state("SLURM", "job in a container on all nodes", job["problem"]))
    checks += of_links(job["links"], wanted) if job.get("links") else ()
    checks += of_kernels(job.get("kernels", {}), wanted)
    checks += [state(node, "pod", problem) for node, problem in pods.items()]
    failures = [line for line in checks if line["passed"] is False]
    return {
        "passed": not failures,
        "failures": [words(line) for line in failures],
        "checks": checks,
        "links": job.get("links") or {},
        "cells": list(cells(job["links"])) if job.get("links") else [],
    }


def cells(links: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yields the chart's cells: row, column, and bytes per second."""
    for one, other, found in links["pairs"]:
        yield from ((one, other, found), (other, one, found))
    yield from ((node, node, found) for node, found in links["inside"].items())


def words(line: Check) -> str:
    """Returns a check that did not pass as one line."""
    if not line["threshold"]:
        return f"{line['node']}: {line['check']}: {line['note']}"
    value = "not measured" if line["value"] is None else f"{line['value']:.4g} {line['unit']}"
    note = f" ({line['note']})" if line["note"] else ""
    return f"{line['node']}: {line['check']}: {value}, threshold {line['threshold']} {line['unit']}{note}"


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"acceptance": acceptance, "job_found": job_found, "out_of_service": out_of_service}
