"""Every query of every panel and rule returns data from the lab, or from recorded metrics for a documented reason.

A Prometheus of the test with the platform's rules scrapes the recorded metrics.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from lab import STATE
from programs import loaded, program

HERE = Path(__file__).parent
RECORDED = sorted((HERE / "recorded").glob("*.prom"))
ABSENT: dict[str, str] = yaml.safe_load((HERE / "not_in_the_lab.yml").read_text())
RULES = sorted((ROOT / "roles/prometheus/templates/rules").glob("*.yml"))

dashboards = loaded(ROOT / "scripts/dashboards")


def queries() -> dict[str, tuple[str, bool]]:
    """Returns location of each query → its text, and whether it is evaluated over time."""
    found = {}
    for title, panel in dashboards.panels():
        for target in panel["targets"]:
            # Some dashboards have two panels with the same title.
            key = f"{title}: {panel['title']} ({panel['type']}) {target['refId']}"
            found[key] = (dashboards.filled(target["expr"], "lab"), panel["type"] == "timeseries")
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                found[f"{file.stem}: {rule.get('alert') or rule['record']}"] = (rule["expr"], False)
    return found


QUERIES = queries()


def names(query: str) -> set[str]:
    """Returns the metrics that a query reads."""
    bare = re.sub(r'"[^"]*"', '""', query)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    words = set(re.findall(r"[a-zA-Z_:][\w:]*(?!\w*\s*\()", bare))
    functions = set(re.findall(r"([a-zA-Z_:][\w:]*)\s*\(", bare))
    keywords = {"and", "or", "unless", "bool", "offset", "by", "on", "group_left", "Inf", "NaN", "m", "h", "s", "d"}
    return {word for word in words if word not in functions | keywords and not re.fullmatch(r"\d\w*", word)}


def jobs_of(query: str) -> set[str]:
    """Returns the jobs and applications that a query selects."""
    return set(re.findall(r'(?:job|app)=~?"([\w-]+)', query))


def absent(query: str) -> str:
    """Returns the reason for which the lab has no data for a query, empty if it must have data."""
    read = names(query) | jobs_of(query)
    return next((why for name in read for start, why in ABSENT.items() if name.startswith(start)), "")


def comparable(query: str) -> str:
    """Returns an alert's condition without comparisons with constants, since a false comparison returns no data."""
    parts = re.split(r"(\{[^}]*\})", query)
    for number, part in enumerate(parts):
        if not part.startswith("{"):
            part = re.sub(r"\boffset \w+", " ", part)
            part = re.sub(r"(==|!=|>=|<=|>|<)\s*(bool\s+)?(Inf|[\d.]+)(\s*\*\s*[\d.]+)*", " ", part)
            # Both sides must have data, whichever is larger.
            part = re.sub(r"==|!=|>=|<=|>|<", "+", part)
            parts[number] = re.sub(r"\bunless\b", "or", part)
    return "".join(parts)


def metrics_of(prometheus: Any) -> set[str]:
    """Returns the names of all metrics in a Prometheus."""
    return set(prometheus.get("label/__name__/values"))


class Exporter(BaseHTTPRequestHandler):
    """Exposes the recorded metrics."""

    def do_GET(self) -> None:
        """Responds to every request with all metrics."""
        text = "\n".join(file.read_text() for file in RECORDED)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: object) -> None:
        """Suppresses the log of requests."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yields a Prometheus that has scraped the recorded metrics and evaluated the rules."""
    folder = tmp_path_factory.mktemp("prometheus")
    exporter = ThreadingHTTPServer(("127.0.0.1", 0), Exporter)
    threading.Thread(target=exporter.serve_forever, daemon=True).start()
    for file in RULES:
        (folder / file.name).write_text(file.read_text())
    address = f"127.0.0.1:{exporter.server_port}"
    jobs = {"recorded": {"node": "gpu1", "cluster": "lab", "app": "serving", "pod": "p"}}
    jobs |= {job: {"node": "gpu1", "cluster": "lab"} for job in ("kubernetes-lab-nodes", "dcgm")}
    jobs["kubernetes-lab-services"] = {"cluster": "lab", "app": "serving"}
    scrapes = [
        {"job_name": job, "static_configs": [{"targets": [address], "labels": labels}], "scrape_interval": "1s"}
        for job, labels in jobs.items()
    ]
    scrapes[0]["honor_labels"] = True
    for scrape in scrapes[1:]:
        # Only whether these targets are up matters.
        scrape["metric_relabel_configs"] = [{"source_labels": ["__name__"], "regex": ".+", "action": "drop"}]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{folder}/*.yml"],
        "scrape_configs": scrapes,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    free = ThreadingHTTPServer(("127.0.0.1", 0), Exporter)
    port = free.server_port
    free.server_close()
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
    prometheus = dashboards.Prometheus(f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                # This recording rule depends on others, so it is evaluated last.
                if "job:gpu_utilisation:avg" in metrics_of(prometheus) and prometheus.instant(
                    "job:training_progressing"
                ):
                    break
            except urllib.error.URLError:
                pass
            time.sleep(1)
        time.sleep(3)
        yield prometheus
    finally:
        server.terminate()
        server.wait()
        exporter.shutdown()


def has_data(prometheus: Any, query: str, over_time: bool) -> bool:
    """Returns whether a query returns series, for an alert without the comparisons of its condition."""
    if over_time:
        return bool(prometheus.range(query, seconds=7200))
    return bool(prometheus.instant(query) or prometheus.instant(comparable(query)))


EXPOSED = {name for file in RECORDED for name in re.findall(r"^([a-zA-Z_:][\w:]*)", file.read_text(), re.MULTILINE)}
# Every target has these metrics; their queries select a job.
EXPOSED -= {"up", "probe_success"}
RECORDS = {
    rule["record"]: rule["expr"]
    for file in RULES
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
    if "record" in rule
}


def all_recorded(query: str) -> bool:
    """Returns whether all metrics of a query are recorded, or computed by rules from recorded ones."""
    return all(name in EXPOSED or (name in RECORDS and all_recorded(RECORDS[name])) for name in names(query))


# Queries without data in the lab, and, since there may be no lab, all whose metrics were recorded.
WITH_RECORDED = [key for key, (query, _) in QUERIES.items() if absent(query) or (names(query) and all_recorded(query))]


@pytest.mark.parametrize("key", WITH_RECORDED)
def test_a_query_is_answered_by_recorded_metrics(recorded: Any, key: str) -> None:
    query, over_time = QUERIES[key]
    assert has_data(recorded, query, over_time), f"{absent(query)}; {query}"


def test_every_exception_is_used() -> None:
    read = set().union(*(names(query) | jobs_of(query) for query, _ in QUERIES.values()))
    unused = [start for start in ABSENT if not any(name.startswith(start) for name in read)]
    assert unused == []


def test_names_are_found_in_a_query() -> None:
    query = (
        'sum by (a, node) (rate(b_total{job="c"}[5m])) / on (d) group_left (e) f:g:h unless max(i) offset 10m > bool 3'
    )
    assert names(query) == {"b_total", "f:g:h", "i"}


def test_gpu_metrics_that_are_exposed_are_those_that_are_queried() -> None:
    counters = (ROOT / "roles/dcgm_exporter/files/counters.csv").read_text()
    exposed = set(re.findall(r"^(DCGM_\w+),", counters, re.MULTILINE))
    queried = {name for query, _ in QUERIES.values() for name in names(query) if name.startswith("DCGM_")}
    assert exposed == queried


@pytest.fixture(scope="module")
def live() -> Any:
    """Returns the lab's Prometheus."""
    assert (STATE / "ssh/config").exists(), f"no lab in {STATE}: run `make lab` first"
    return dashboards.Prometheus.of_lab()


@pytest.mark.lab
def test_every_target_of_the_lab_is_up(live: Any) -> None:
    down = [
        (t["labels"]["job"], t["labels"]["instance"], t["lastError"])
        for t in live.get("targets")["activeTargets"]
        if t["health"] != "up"
    ]
    assert down == []


@pytest.mark.lab
def test_every_other_query_is_answered_by_the_lab(live: Any) -> None:
    missing = []
    for key, (query, over_time) in QUERIES.items():
        if not absent(query) and not has_data(live, query, over_time):
            missing.append(f"{key}: {query}")
    assert missing == [], "\n".join(missing)


@pytest.mark.lab
def test_no_rule_of_the_lab_fails(live: Any) -> None:
    failing = [
        (rule["name"], rule.get("lastError"))
        for group in live.get("rules")["groups"]
        for rule in group["rules"]
        if rule["health"] != "ok"
    ]
    assert failing == []
