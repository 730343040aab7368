"""The schemas reject invalid values by name; the READMEs match the values; the effects of values."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from helm import CHARTS, CI, ROOT, Document, HelmError, Pod, component, helm, name_of, only, pods, render

LONG = "x" * 64

# chart, values by dotted path, text in the message
WRONG: list[tuple[str, Document, str]] = [
    ("serving", {"replicas": 2}, "replicas"),
    ("serving", {"vllm.maxModelLength": 4096}, "maxModelLength"),
    ("serving", {"vllm.maxModelLen": 0}, "vllm.maxModelLen"),
    ("serving", {"vllm.maxModelLen": "128k"}, "vllm.maxModelLen"),
    ("serving", {"vllm.dtype": "int4"}, "vllm.dtype"),
    ("serving", {"vllm.kvCacheDtype": "fp4"}, "vllm.kvCacheDtype"),
    ("serving", {"vllm.attention": "flash"}, "vllm.attention"),
    ("serving", {"vllm.attention": ""}, "vllm.attention"),
    ("serving", {"vllm.tensorParallelSize": 0}, "vllm.tensorParallelSize"),
    ("serving", {"vllm.tensorParallelSize": 4}, "vllm.tensorParallelSize"),
    (
        "serving",
        {"gpu.count": 3, "vllm.tensorParallelSize": 3},
        "vllm.tensorParallelSize 3 does not divide the 16 heads",
    ),
    ("serving", {"vllm.gpuMemoryUtilization": 1.2}, "vllm.gpuMemoryUtilization"),
    ("serving", {"vllm.gpuMemoryUtilization": 0}, "vllm.gpuMemoryUtilization"),
    ("serving", {"vllm.extraArgs": ["--api-key=abc"]}, "vllm.extraArgs"),
    ("serving", {"vllm.extraEnv": [{"value": "1"}]}, "vllm.extraEnv"),
    ("serving", {"vllm.extraEnv": [{"name": "A", "valeu": "1"}]}, "vllm.extraEnv"),
    ("serving", {"adapters": {"enabled": True, "maxRank": 12}}, "adapters.maxRank"),
    ("serving", {"adapters": {"enabled": True, "serve": [{"name": "a", "model": "a@b"}]}}, "adapters.serve.0.model"),
    ("serving", {"adapters.serve": [{"name": "a", "model": "models:/a/1"}]}, "adapters.enabled is false"),
    ("serving", {"adapters": {"enabled": True, "maxActive": 4, "maxLoaded": 3}}, "adapters.maxActive"),
    (
        "serving",
        {"adapters": {"enabled": True, "serve": [{"name": "ictx-1b", "model": "models:/a/1"}]}},
        "the model or another adapter has the name",
    ),
    (
        "serving",
        {
            "adapters": {
                "enabled": True,
                "maxLoaded": 1,
                "maxActive": 1,
                "serve": [{"name": "a", "model": "models:/a/1"}, {"name": "b", "model": "models:/a/1"}],
            }
        },
        "adapters.maxLoaded is 1",
    ),
    ("serving", {"router.backends": [{"service": "Large"}]}, "router.backends.0.service"),
    ("serving", {"router.backends": [{"service": "ictx-serving"}]}, '"ictx-serving" is this release'),
    ("serving", {"router.backends": [{"service": "a"}], "router.enabled": False}, "router.enabled is false"),
    ("serving", {"router.backends": [{"service": "a"}], "canary.service": "a"}, '"a" is this release, or listed twice'),
    ("serving", {"canary": {"service": "a", "weight": 101}}, "canary.weight"),
    ("serving", {"canary": {"service": "a", "by": "edge"}}, "canary.by is edge"),
    ("serving", {"preset": "v100"}, "preset"),
    ("serving", {"model.sizes": {"parameters": 1}}, "model.sizes"),
    ("serving", {"kvOffload.diskClaim": "a"}, "kvOffload.diskClaim requires kvOffload.cpuGiB"),
    ("serving", {"kvOffload": {"cpuGiB": 8, "backend": "disk"}}, "kvOffload.backend"),
    ("serving", {"kvOffload.cpuGiB": 16}, "/dev/shm alone takes 17408 MiB"),
    ("serving", {"gpu.count": -1}, "gpu.count"),
    ("serving", {"gpu.resourceName": "gpu"}, "gpu.resourceName"),
    ("serving", {"image.digest": "sha256:abc"}, "image.digest"),
    ("serving", {"image.digest": "latest"}, "image.digest"),
    ("serving", {"image.repository": "Registry/ICTX"}, "image.repository"),
    ("serving", {"image.pullPolicy": "Sometimes"}, "image.pullPolicy"),
    ("serving", {"model.name": "a model"}, "model.name"),
    ("serving", {"model.name": LONG}, "model.name"),
    ("serving", {"model.alias": ""}, "model.alias"),
    ("serving", {"model.version": "v12"}, "model.version"),
    ("serving", {"model.trainingImageDigest": "12ab"}, "model.trainingImageDigest"),
    ("serving", {"mlflow.trackingUri": "ictx-mlflow:5000"}, "mlflow.trackingUri"),
    ("serving", {"mlflow.password": "abc"}, "password"),
    ("serving", {"apiKey.value": "abc"}, "value"),
    ("serving", {"tls.names": ["a b"]}, "tls.names"),
    ("serving", {"tls.secret": "abc"}, "secret"),
    ("serving", {"service.externalTrafficPolicy": "local"}, "service.externalTrafficPolicy"),
    ("serving", {"storage.type": "hostPath"}, "storage.type"),
    ("serving", {"storage.size": "8 GB"}, "storage.size"),
    ("serving", {"storage.accessModes": []}, "storage.accessModes"),
    ("serving", {"shmSize": "1GB"}, "shmSize"),
    ("serving", {"resources.limits.memory": "16 Gi"}, "resources.limits.memory"),
    ("serving", {"resources.memory": "16Gi"}, "memory"),
    ("serving", {"startupTimeoutMinutes": 0}, "startupTimeoutMinutes"),
    ("serving", {"drain.timeoutSeconds": -1}, "drain.timeoutSeconds"),
    ("serving", {"rollout.maxSurge": 0}, "rollout.maxSurge"),
    ("serving", {"rollout.maxUnavailable": 1}, "maxUnavailable"),
    ("serving", {"service.type": "ExternalName"}, "service.type"),
    ("serving", {"service.port": 70000}, "service.port"),
    ("serving", {"service.nodePort": 31000}, "service.type"),
    ("serving", {"ingress.enabled": True}, "ingress.host"),
    ("serving", {"httpRoute.enabled": True}, "httpRoute.parentRefs"),
    ("serving", {"autoscaling.type": "vpa"}, "autoscaling.type"),
    ("serving", {"autoscaling.type": "keda"}, "autoscaling.prometheusUrl"),
    ("serving", {"autoscaling.minReplicas": 9}, "autoscaling.minReplicas"),
    ("serving", {"podDisruptionBudget.maxUnavailable": 0}, "podDisruptionBudget.maxUnavailable"),
    ("serving", {"networkPolicy.allowFrom": [{"cidr": "10.0.0.0/8"}]}, "networkPolicy.allowFrom"),
    ("serving", {"metrics.serviceMonitor.interval": "often"}, "metrics.serviceMonitor.interval"),
    ("serving", {"security.runAsUser": 0}, "security.runAsUser"),
    ("serving", {"security.privileged": True}, "privileged"),
    ("serving", {"topologySpread.whenUnsatisfiable": "Maybe"}, "topologySpread.whenUnsatisfiable"),
    ("serving", {"tolerations": [{"effect": "Never"}]}, "tolerations.0.effect"),
    ("serving", {"podLabels": {"a": LONG}}, "podLabels.a"),
    ("serving", {"podLabels": {"app.kubernetes.io/component": "llm"}}, "podLabels"),
    ("serving", {"commonLabels": {"app.kubernetes.io/part-of": "platform"}}, "commonLabels"),
    ("mlflow", {"commonLabels": {"helm.sh/chart": "a"}}, "commonLabels"),
    ("serving", {"networkPolicy.allowFrom": [{}]}, "networkPolicy.allowFrom.0"),
    ("serving", {"image.repository": "registry:5000/ictx/serving:1.2"}, "image.repository"),
    ("serving", {"extraVolumes": [{"emptyDir": {}}]}, "extraVolumes.0"),
    ("serving", {"extraVolumes": [{"name": "models", "emptyDir": {}}]}, "extraVolumes"),
    ("serving", {"extraVolumes": [{"name": "{{ print `models` }}", "emptyDir": {}}]}, "extraVolumes"),
    ("serving", {"extraVolumeMounts": [{"name": "cache", "mountPath": "/a", "path": "b"}]}, "path"),
    ("serving", {"extraVolumeMounts": [{"name": "absent", "mountPath": "/a"}]}, "extraVolumeMounts"),
    ("serving", {"extraVolumeMounts": [{"name": "cache", "mountPath": "/models/"}]}, "extraVolumeMounts"),
    ("serving", {"initContainers": [{"name": "pull", "image": "a"}]}, "initContainers"),
    ("serving", {"extraContainers": [{"name": "a"}]}, "image"),
    ("serving", {"extraContainers": [{"name": "a", "image": "a"}, {"name": "a", "image": "b"}]}, "extraContainers"),
    ("serving", {"extraObjects": [{}]}, "extraObjects.0"),
    ("mlflow", {"extraVolumes": [{"name": "backup", "emptyDir": {}}]}, "extraVolumes"),
    ("mlflow", {"extraVolumeMounts": [{"name": "tmp", "mountPath": "/data"}]}, "extraVolumeMounts"),
    ("mlflow", {"extraContainers": [{"name": "metrics", "image": "a"}]}, "extraContainers"),
    ("mlflow", {"replicaCount": 2}, "replicaCount"),
    ("mlflow", {"replicaCount": -1}, "replicaCount"),
    ("mlflow", {"database.type": "mysql"}, "database.type"),
    ("mlflow", {"database.type": "postgresql"}, "database.postgresql.existingSecret"),
    ("mlflow", {"database.postgresql.uri": "postgresql://u:p@h/d"}, "uri"),
    (
        "mlflow",
        {"replicaCount": 2, "database.type": "postgresql", "database.postgresql.existingSecret": "db"},
        "persistence.accessModes",
    ),
    ("mlflow", {"artifacts.type": "gcs"}, "artifacts.type"),
    ("mlflow", {"artifacts.type": "s3"}, "artifacts.s3.uri"),
    ("mlflow", {"artifacts.s3.uri": "https://bucket"}, "artifacts.s3.uri"),
    ("mlflow", {"auth.password": "abc"}, "password"),
    ("mlflow", {"auth.adminUsername": "a:b"}, "auth.adminUsername"),
    ("mlflow", {"auth.defaultPermission": "ALL"}, "auth.defaultPermission"),
    ("mlflow", {"auth.oidc.issuer": "https://sso.example.org"}, "auth.oidc.clientId"),
    ("mlflow", {"auth.oidc.issuer": "http://sso.example.org"}, "auth.oidc.issuer"),
    ("mlflow", {"auth.oidc.scopes": ["profile"]}, "auth.oidc.scopes"),
    ("mlflow", {"auth.oidc.clientSecret": "abc"}, "clientSecret"),
    ("mlflow", {"server.workers": 0}, "server.workers"),
    ("mlflow", {"server.allowedHosts": ["a.example, b.example"]}, "server.allowedHosts.0"),
    ("mlflow", {"server.allowedHosts": ["https://a.example"]}, "server.allowedHosts.0"),
    ("mlflow", {"server.corsAllowedOrigins": ["a.example"]}, "server.corsAllowedOrigins.0"),
    ("mlflow", {"server.corsAllowedOrigins": ["https://a.example/"]}, "server.corsAllowedOrigins.0"),
    ("serving", {"httpRoute.hostnames": ["https://a.example"]}, "httpRoute.hostnames.0"),
    ("mlflow", {"server.extraArgs": ["--backend-store-uri=postgresql://u:p@h/d"]}, "server.extraArgs"),
    ("mlflow", {"persistence.size": "lots"}, "persistence.size"),
    ("mlflow", {"persistence.accessModes": ["RWO"]}, "persistence.accessModes"),
    ("mlflow", {"backup.schedule": "daily"}, "backup.schedule"),
    ("mlflow", {"backup.retention": 0}, "backup.retention"),
    ("mlflow", {"restore.snapshot": "yesterday", "backup.enabled": True}, "restore.snapshot"),
    ("mlflow", {"restore.snapshot": "latest"}, "backup.enabled"),
    ("mlflow", {"gc.olderThan": "a month"}, "gc.olderThan"),
    ("mlflow", {"security.runAsUser": 0}, "security.runAsUser"),
    ("mlflow", {"service.nodePort": 31000}, "service.type"),
    ("mlflow", {"httpRoute": {"enabled": True, "hostnames": ["a"]}}, "httpRoute.parentRefs"),
    ("mlflow", {"httpRoute": {"enabled": True, "parentRefs": [{"name": "a"}]}}, "httpRoute.hostnames"),
    ("mlflow", {"fullnameOverride": "x" * 39}, "fullnameOverride"),
]


@pytest.mark.parametrize(("chart", "values", "named"), WRONG, ids=[f"{c}:{json.dumps(v)[:60]}" for c, v, _ in WRONG])
def test_a_wrong_value_is_refused_by_its_name(chart: str, values: Document, named: str) -> None:
    with pytest.raises(HelmError) as caught:
        render(CHARTS[chart], None, values)
    assert re.search(rf"(^|[\s.:]){re.escape(named)}\b", str(caught.value), re.M), caught.value


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize(
    "repository", ["serving", "ictx/serving", "registry.example.org:5000/a/b/c_d.e", "[fd00:10::15]:5000/ictx/serving"]
)
def test_an_image_may_be_in_any_registry(chart: str, repository: str) -> None:
    """The registry's address may be an IPv6 one (ictx_registry)."""
    assert server(chart, image__repository=repository).containers[-1]["image"].startswith(f"{repository}:")


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("release", ["v1.2", "2nd"])
def test_a_release_name_that_no_service_can_have_is_refused(chart: str, release: str) -> None:
    with pytest.raises(HelmError, match="set fullnameOverride"):
        helm("template", release, str(CHARTS[chart]))
    assert helm("template", release, str(CHARTS[chart]), "--set", "fullnameOverride=a")


@pytest.mark.parametrize(("chart", "longest"), [("serving", 52), ("mlflow", 38)])
def test_releases_whose_long_names_begin_alike_share_no_object(chart: str, longest: int) -> None:
    def names(release: str) -> set[str]:
        text = helm("template", release, str(CHARTS[chart]))
        return {name_of(document) for document in yaml.safe_load_all(text) if document}

    # With the chart's name in the release's, and without: helm accepts up to 53 characters.
    for begin in (f"{chart}-", "a"):
        release = f"{begin:x<52}"
        first, second = names(f"{release}1"), names(f"{release}2")
        assert not first & second
        assert len(first) == len(second) > 3
        (server,) = (name for name in first if re.fullmatch(rf"Deployment/{begin}x+-[0-9a-f]{{8}}", name))
        assert len(server.partition("/")[2]) == longest
        assert max(len(name.partition("/")[2]) for name in first) <= 63
    fits = f"{f'{chart}-':x<{longest}}"
    assert f"Deployment/{fits}" in names(fits)
    assert f"Deployment/a-{chart}" in names("a")


def objects(schema: Any, where: str = "") -> list[tuple[str, Document]]:
    """Returns all parts of a schema that describe an object with named properties."""
    found = []
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            found.append((where, schema))
        for key, part in schema.items():
            found += objects(part, f"{where}/{key}")
    return found


@pytest.mark.parametrize("chart", CHARTS)
def test_the_schema_knows_every_value_and_no_other(chart: str) -> None:
    schema = json.loads((CHARTS[chart] / "values.schema.json").read_text())
    assert [where for where, part in objects(schema) if part.get("additionalProperties") is not False] == []

    def compare(values: Document, part: Document, where: str) -> None:
        assert set(values) == set(part["properties"]) - {"global"}, where
        for key, value in values.items():
            below = part["properties"][key]
            below = schema["definitions"][below["$ref"].rsplit("/", 1)[1]] if "$ref" in below else below
            if isinstance(value, dict) and value and "properties" in below and key not in {"resources"}:
                compare(value, below, f"{where}.{key}")

    compare(yaml.safe_load((CHARTS[chart] / "values.yaml").read_text()), schema, chart)


def test_the_readmes_are_those_of_the_values(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "chart-readme"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "serving"
    shutil.copytree(CHARTS["serving"], copy)
    values = (copy / "values.yaml").read_text()
    (copy / "values.yaml").write_text(values.replace("replicaCount: 1", "replicaCount: 5"))
    done = subprocess.run([*script, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "`replicaCount` | `5`" in done.stderr
    (copy / "values.yaml").write_text(values + "more: 1\n")
    done = subprocess.run([*script, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "above more" in done.stderr


def server(chart: str, ci: str = "", **values: Any) -> Pod:
    """Returns the server's pod; `__` in names of values is replaced with a dot."""
    dotted = {key.replace("__", "."): value for key, value in values.items()}
    file = CI[f"{chart}/{ci}"][1] if ci else None
    return next(pods([component(render(CHARTS[chart], file, dotted), "Deployment", "server")]))


def option(container: Document, name: str) -> str:
    """Returns the value of an argument."""
    return container["args"][container["args"].index(name) + 1]


def services(documents: list[Document]) -> dict[str, Document]:
    """Returns the Services by name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == "Service"}


def environment(container: Document) -> dict[str, Any]:
    """Returns the environment variables, with None for values from other objects."""
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def test_vllm_gets_what_the_values_say() -> None:
    vllm = server("serving", "gpu-1m").container("vllm")
    assert vllm["command"] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(vllm, "--max-model-len") == "1048576"
    assert option(vllm, "--max-num-batched-tokens") == "8192"
    assert vllm["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 1}
    vllm = server("serving", "multi-gpu").container("vllm")
    assert option(vllm, "--tensor-parallel-size") == "4"
    assert option(vllm, "--served-model-name") == "ictx"
    assert vllm["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert "--enable-prefix-caching" in vllm["args"]


def test_the_lab_serves_on_the_cpu() -> None:
    pod = server("serving", "cpu")
    vllm = pod.container("vllm")
    assert "--max-model-len" not in vllm["args"]
    assert "--gpu-memory-utilization" not in vllm["args"]
    assert "--enforce-eager" in vllm["args"]
    assert environment(vllm)["TORCH_COMPILE_DISABLE"] == "1"
    assert json.loads(option(vllm, "--compilation-config")) == {"custom_ops": ["none"]}
    assert list(vllm["resources"]["limits"]) == ["memory"]
    assert environment(vllm)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert option(vllm, "--attention-backend") == "CPU_MLA"
    assert "runtimeClassName" not in pod.spec


def test_our_attention_is_switched_on_by_one_value() -> None:
    assert environment(server("serving", "gpu-small").container("vllm"))["ICTX_VLLM_ATTENTION"] == "vllm"
    assert "TORCH_COMPILE_DISABLE" not in environment(server("serving", "gpu-small").container("vllm"))
    vllm = server("serving", "gpu-small", vllm__attention="ictx").container("vllm")
    assert environment(vllm)["ICTX_VLLM_ATTENTION"] == "ictx"


@pytest.mark.parametrize(
    ("values", "uri", "folder"),
    [
        ({}, "models:/ictx-1b@champion", "/models/ictx-1b/champion"),
        ({"model__alias": "candidate"}, "models:/ictx-1b@candidate", "/models/ictx-1b/candidate"),
        ({"model__version": "12"}, "models:/ictx-1b/12", "/models/ictx-1b/12"),
        ({"model__version": 12}, "models:/ictx-1b/12", "/models/ictx-1b/12"),
    ],
)
def test_what_is_pulled_is_what_is_served(values: Document, uri: str, folder: str) -> None:
    pod = server("serving", **values)
    pull, vllm = pod.container("pull"), pod.container("vllm")
    assert [*pull["command"], *pull["args"]] == ["ictx", "pull", uri, "--to", folder]
    assert option(vllm, "--model") == folder
    assert pod.annotations["ictx/model-uri"] == uri
    assert pod.labels.get("ictx/model-version", "") == str(values.get("model__version", ""))
    (mount,) = [mount for mount in vllm["volumeMounts"] if mount["name"] == "models"]
    assert mount["readOnly"] is True


def test_a_roll_waits_for_the_new_pod_and_can_be_forced() -> None:
    documents = render(CHARTS["serving"])
    strategy = only(documents, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
    assert server("serving").annotations != server("serving", rollout__restartedAt="1").annotations
    assert server("serving", rollout__restartedAt=1767139200).annotations["ictx/restarted-at"] == "1767139200"
    (pre_stop,) = [server("serving").container("vllm")["lifecycle"]["preStop"]["exec"]["command"]]
    assert pre_stop[3:5] == ["10", "300"]


@pytest.mark.parametrize(("chart", "first", "main"), [("serving", "pull", "vllm"), ("mlflow", "prepare", "mlflow")])
def test_what_is_extra_stands_beside_what_the_chart_has(chart: str, first: str, main: str) -> None:
    documents = render(CHARTS[chart], CHARTS[chart] / "ci" / "extra.yaml")
    server = next(pods([only(documents, "Deployment")]))
    image = server.container(main)["image"]
    assert [container["name"] for container in server.spec["initContainers"]] == [first, "check-notice"]
    assert [container["name"] for container in server.spec["containers"]] == [main, "watch-notice"]
    assert {container["image"] for container in server.containers} == {image}
    mount = {"name": "notice", "mountPath": "/etc/notice", "readOnly": True}
    assert mount in server.container(main)["volumeMounts"]
    assert {"name": "notice", "configMap": {"name": f"ictx-{chart}-notice"}} in server.spec["volumes"]
    assert {f"ConfigMap/ictx-{chart}-notice", "ConfigMap/ictx-contact"} <= {name_of(document) for document in documents}


def test_mlflow_takes_init_containers_where_it_has_none() -> None:
    file = CHARTS["mlflow"] / "ci" / "extra.yaml"
    values = {"database.type": "postgresql", "database.postgresql.existingSecret": "db", "auth.enabled": False}
    server = next(pods([only(render(CHARTS["mlflow"], file, values), "Deployment")]))
    assert [container["name"] for container in server.spec["initContainers"]] == ["check-notice"]


# Enables every volume and container of a server's pod.
ALL_OF_A_POD: dict[str, Document] = {
    "serving": {"tls.enabled": True, "mlflow.caConfigMap": "ca"},
    "mlflow": {"backup.enabled": True, "metrics.annotations": True, "tls.existingSecret": "tls"},
}


@pytest.mark.parametrize("chart", CHARTS)
def test_every_name_and_path_of_the_chart_is_refused(chart: str) -> None:
    server = next(pods([only(render(CHARTS[chart], None, ALL_OF_A_POD[chart]), "Deployment")]))
    wrong: list[Document] = [{"extraVolumes": [{"name": v["name"], "emptyDir": {}}]} for v in server.spec["volumes"]]
    wrong += [{"initContainers": [{"name": c["name"], "image": "a"}]} for c in server.containers]
    for mount in server.spec["containers"][0]["volumeMounts"]:
        wrong.append({"extraVolumeMounts": [{"name": "tmp", "mountPath": mount["mountPath"]}]})
    for values in wrong:
        with pytest.raises(HelmError, match=f"{next(iter(values))}: .* already"):
            render(CHARTS[chart], None, values)


def test_autoscaling_owns_the_number_of_pods() -> None:
    for kind, ci in (("HorizontalPodAutoscaler", "multi-gpu"), ("ScaledObject", "gpu-1m")):
        documents = render(CHARTS["serving"], CI[f"serving/{ci}"][1])
        deployment = component(documents, "Deployment", "server")
        assert "replicas" not in deployment["spec"]
        target = only(documents, kind)["spec"]["scaleTargetRef"]["name"]
        assert target == deployment["metadata"]["name"]
    (trigger,) = only(documents, "ScaledObject")["spec"]["triggers"]
    query = 'sum(vllm:num_requests_waiting{namespace="ictx",pod=~"ictx-serving-[0-9a-z]{1,10}-?[0-9a-z]{5}"})'
    assert trigger["metadata"]["query"] == query


@pytest.mark.parametrize(
    ("values", "routed"),
    [
        ({}, False),
        ({"replicaCount": 2}, True),
        ({"replicaCount": 2, "router.enabled": False}, False),
        ({"router.enabled": True}, True),
        ({"autoscaling.type": "hpa", "autoscaling.maxReplicas": 2}, True),
        ({"autoscaling.type": "hpa", "autoscaling.maxReplicas": 1, "replicaCount": 3}, False),
    ],
)
def test_there_is_a_router_where_there_are_several_pods(values: Document, routed: bool) -> None:
    documents = render(CHARTS["serving"], None, values)
    names = {name_of(document) for document in documents}
    assert ("Deployment/ictx-serving-router" in names, "Service/ictx-serving-replicas" in names) == (routed, routed)
    selector = services(documents)["ictx-serving"]["spec"]["selector"]
    assert selector["app.kubernetes.io/component"] == ("router" if routed else "server")
    server = next(pods([component(documents, "Deployment", "server")])).container("vllm")
    assert ("--enable-scale-out" in server["args"]) == routed


ROUTED = {"replicaCount": 2, "networkPolicy.allowFrom": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}


def router(**values: Any) -> Pod:
    """Returns the router's pod."""
    dotted = {**ROUTED, **{key.replace("__", "."): value for key, value in values.items()}}
    return next(pods([component(render(CHARTS["serving"], None, dotted), "Deployment", "router")]))


@pytest.mark.attack(
    "H1",
    "A client adds its own server to the router and reads the prompts of others",
    before="vllm-router's /add_worker, /remove_worker and /list_workers require no key",
    now="the router listens only inside its pod; a gate with keys in front of it forwards generation requests only",
)
def test_the_router_listens_on_its_pod_alone_behind_the_gate() -> None:
    pod = router()
    inner, outer = pod.container("router"), pod.container("front")
    assert (option(inner, "--host"), option(inner, "--port")) == ("127.0.0.1", "30000")
    assert [port["name"] for port in inner["ports"]] == ["metrics"]
    assert outer["command"][-1] == "ictx.serve.front:app"
    assert environment(outer)["ICTX_ROUTER"] == "http://127.0.0.1:30000"
    assert "--ssl-certfile" in outer["args"]
    for refused in ("--host=0.0.0.0", "--port", "--worker-urls", "--service-discovery"):
        with pytest.raises(HelmError, match="router"):
            router(router__extraArgs=[refused])


def test_servers_are_reached_through_the_router_alone() -> None:
    documents = render(CHARTS["serving"], None, ROUTED)
    selectors = {
        name: component(documents, "Deployment", name)["spec"]["selector"]["matchLabels"]
        for name in ("server", "router")
    }
    found = policies(documents)
    requests, _ = found["ictx-serving"]["spec"]["ingress"]
    assert requests["from"] == [{"podSelector": {"matchLabels": selectors["router"]}}]
    clients, metrics = found["ictx-serving-router"]["spec"]["ingress"]
    assert clients["from"] == [{"podSelector": {"matchLabels": TEST_PODS}}, *ROUTED["networkPolicy.allowFrom"]]
    assert metrics["ports"] == [{"port": "metrics", "protocol": "TCP"}]
    _, servers = found["ictx-serving-router"]["spec"]["egress"]
    assert servers["to"] == [{"podSelector": {"matchLabels": selectors["server"]}}]
    _, entry = found["ictx-serving-test"]["spec"]["egress"]
    assert entry["to"] == [{"podSelector": {"matchLabels": selectors["router"]}}]


def test_the_router_finds_servers_by_dns_and_verifies_them() -> None:
    documents = render(CHARTS["serving"], None, ROUTED)
    replicas = services(documents)["ictx-serving-replicas"]
    assert replicas["spec"]["clusterIP"] == "None"
    assert "publishNotReadyAddresses" not in replicas["spec"], "a pod that is not ready must get no requests"
    front = environment(router().container("front"))
    assert (front["ICTX_REPLICAS"], front["ICTX_REPLICAS_NAME"]) == ("ictx-serving-replicas", "ictx-serving")
    assert front["ICTX_REPLICAS_CA"] == "/etc/ictx/tls/ca.crt"
    assert "ICTX_REPLICAS_NAME" not in environment(router(tls__enabled=False).container("front"))


def test_the_router_goes_after_the_gate_before_it() -> None:
    pod = router()
    hooks = {name: pod.container(name)["lifecycle"]["preStop"]["exec"]["command"] for name in ("front", "router")}
    assert hooks["front"] == ["sleep", "10"]
    assert hooks["router"][3:] == ["15", "300", "http://127.0.0.1:29000/metrics", "vllm_router_running_requests"]
    assert option(pod.container("front"), "--timeout-graceful-shutdown") == "300"
    assert pod.spec["terminationGracePeriodSeconds"] > 15 + 300
    assert router(tls__revision="1").annotations != router(tls__revision="2").annotations


def test_the_router_gets_what_the_values_say() -> None:
    values = {"policy": "consistent_hash", "circuitBreaker": {"failures": 7, "seconds": 9}, "balanceThreshold": 3}
    documents = render(CHARTS["serving"], None, {**ROUTED, "router": values})
    found = next(pods([component(documents, "Deployment", "router")])).container("router")
    assert [option(found, f"--{name}") for name in ("policy", "cb-failure-threshold", "cb-timeout-duration-secs")] == [
        "consistent_hash", "7", "9",
    ]  # fmt: skip
    assert option(found, "--balance-abs-threshold") == "3"
    server = next(pods([component(documents, "Deployment", "server")])).container("vllm")
    assert "--enable-scale-out" not in server["args"], "only cache_aware tokenizes prompts"


def policies(documents: list[Document]) -> dict[str, Document]:
    """Returns the NetworkPolicies by name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == "NetworkPolicy"}


TEST_PODS = {
    "app.kubernetes.io/name": "serving",
    "app.kubernetes.io/instance": "ictx",
    "app.kubernetes.io/component": "test",
}


@pytest.mark.attack(
    "H1",
    "Any pod of the cluster connects to the served model",
    before="an empty networkPolicy.allowFrom allowed all pods",
    now="only the chart's own test and the peers in networkPolicy.allowFrom can connect",
)
def test_nobody_is_let_in_unless_named() -> None:
    requests, metrics = policies(render(CHARTS["serving"]))["ictx-serving"]["spec"]["ingress"]
    assert requests == {
        "ports": [{"port": "https", "protocol": "TCP"}],
        "from": [{"podSelector": {"matchLabels": TEST_PODS}}],
    }
    # Only pods of the cluster, in any namespace.
    assert metrics == {"ports": [{"port": "metrics", "protocol": "TCP"}], "from": [{"namespaceSelector": {}}]}
    peer = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    values = {"networkPolicy": {"allowFrom": [peer], "metricsFrom": []}}
    (requests,) = policies(render(CHARTS["serving"], None, values))["ictx-serving"]["spec"]["ingress"]
    assert requests["from"] == [{"podSelector": {"matchLabels": TEST_PODS}}, peer]


def test_test_pods_reach_the_server_and_nothing_else() -> None:
    documents = render(CHARTS["serving"])
    spec = policies(documents)["ictx-serving-test"]["spec"]
    assert spec["podSelector"]["matchLabels"] == TEST_PODS
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in spec
    names, server = spec["egress"]
    assert [entry["port"] for entry in names["ports"]] == [53, 53]
    assert server["to"] == [
        {"podSelector": {"matchLabels": only(documents, "Deployment")["spec"]["selector"]["matchLabels"]}}
    ]
    tests = [pod for pod in pods(documents) if pod.owner.startswith("Pod/")]
    assert {pod.owner for pod in tests} == {"Pod/ictx-serving-test", "Pod/ictx-serving-test-walk"}
    assert all(TEST_PODS.items() <= pod.labels.items() for pod in tests)


def test_the_gate_is_around_the_whole_server() -> None:
    """In vLLM the last middleware is the outermost, and the last of several values of an option is used."""
    values = {"vllm__extraArgs": ["--middleware", "some.Middleware", "--ssl-certfile", "/tmp/other.crt"]}
    for vllm in (server("serving").container("vllm"), server("serving", **values).container("vllm")):
        assert vllm["args"][-2:] == ["--middleware", "ictx.serve.gate.Gate"]
        assert vllm["args"][-6:-2] == [
            "--ssl-certfile", "/etc/ictx/tls/tls.crt", "--ssl-keyfile", "/etc/ictx/tls/tls.key",
        ]  # fmt: skip


def test_the_keys_are_files_that_change_under_the_server() -> None:
    pod = server("serving", apiKey={"existingSecret": "clients", "key": "now", "previousKey": "before"})
    (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == "keys"]
    now, before = [source["secret"] for source in volume["projected"]["sources"]]
    assert now == {"name": "clients", "items": [{"key": "now", "path": "api-key"}]}
    assert before == {"name": "clients", "items": [{"key": "before", "path": "api-key-previous"}], "optional": True}
    vllm = pod.container("vllm")
    (mount,) = [mount for mount in vllm["volumeMounts"] if mount["name"] == "keys"]
    # A subPath would never be updated.
    assert mount == {"name": "keys", "mountPath": environment(vllm)["ICTX_API_KEYS"], "readOnly": True}
    assert "VLLM_API_KEY" not in environment(vllm)


@pytest.mark.attack(
    "H3",
    "An attacker on the network reads the key of the served model, or impersonates the server",
    before="the endpoint spoke plain HTTP",
    now="HTTPS by default, with a certificate of the platform's authority",
)
def test_the_endpoint_speaks_https() -> None:
    documents = render(CHARTS["serving"])
    vllm = server("serving").container("vllm")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert vllm[probe]["httpGet"] == {"path": "/health", "port": "https", "scheme": "HTTPS"}
    (port,) = services(documents)["ictx-serving"]["spec"]["ports"]
    assert (port["name"], port["targetPort"], port["appProtocol"]) == ("https", "https", "https")
    for pod in pods(documents):
        if pod.owner.startswith("Pod/"):
            test = environment(pod.containers[0])
            assert (test["URL"], test["CA"]) == ("https://ictx-serving:8000", "/etc/ictx/tls/ca.crt")
            (volume,) = [volume["secret"] for volume in pod.spec["volumes"] if volume["name"] == "ca"]
            assert volume["items"] == [{"key": "ca.crt", "path": "ca.crt"}], "a test must not have the private key"
    plain = server("serving", tls__enabled=False).container("vllm")
    assert "--ssl-certfile" not in plain["args"]
    assert plain["readinessProbe"]["httpGet"]["scheme"] == "HTTP"
    assert not [
        d for d in render(CHARTS["serving"], None, {"tls.enabled": False}) if d.get("type") == "kubernetes.io/tls"
    ]


def test_a_generated_certificate_has_the_names_of_the_service() -> None:
    (secret,) = [
        document
        for document in render(CHARTS["serving"], None, {"tls.names": ["llm.example.org", "192.0.2.31"]})
        if document.get("type") == "kubernetes.io/tls"
    ]
    data = {name: base64.b64decode(value) for name, value in secret["data"].items()}
    authority, certificate = (x509.load_pem_x509_certificate(data[name]) for name in ("ca.crt", "tls.crt"))
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    domains = names.get_values_for_type(x509.DNSName)
    assert {"ictx-serving", "ictx-serving.ictx", "ictx-serving.ictx.svc", "llm.example.org"} <= set(domains)
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "192.0.2.31"]
    own = render(CHARTS["serving"], None, {"tls.existingSecret": "mine"})
    assert not [document for document in own if document.get("type") == "kubernetes.io/tls"]


def test_a_new_certificate_rolls_the_pods() -> None:
    """vLLM's --enable-ssl-refresh detects only the first change of a mounted Secret."""
    before, after = server("serving", tls__revision="1"), server("serving", tls__revision="2")
    assert before.annotations != after.annotations


@pytest.mark.parametrize("service", ["ClusterIP", "NodePort", "LoadBalancer"])
def test_metrics_are_in_the_cluster_only(service: str) -> None:
    values = {"service.type": service, "ingress": {"enabled": True, "host": "a.example.org"}}
    documents = render(CHARTS["serving"], None, values)
    found = services(documents)
    assert [port["port"] for port in found["ictx-serving"]["spec"]["ports"]] == [8000]
    assert found["ictx-serving-metrics"]["spec"]["type"] == "ClusterIP"
    assert found["ictx-serving-metrics"]["spec"]["ports"][0]["targetPort"] == "metrics"
    text = str(only(documents, "Ingress"))
    assert "ictx-serving-metrics" not in text
    vllm = server("serving").container("vllm")
    (port,) = [port["containerPort"] for port in vllm["ports"] if port["name"] == "metrics"]
    assert environment(vllm)["ICTX_METRICS_PORT"] == str(port)
    assert server("serving", metrics__annotations=True).annotations["prometheus.io/port"] == str(port)


@pytest.mark.parametrize(
    ("uri", "port"),
    [("http://mlflow:5000", 5000), ("https://mlflow.example.org", 443), ("http://mlflow.example.org/base", 80)],
)
def test_the_network_policy_lets_the_pull_out(uri: str, port: int) -> None:
    policy = policies(render(CHARTS["serving"], None, {"mlflow.trackingUri": uri}))["ictx-serving"]
    ports = [entry["port"] for rule in policy["spec"]["egress"] for entry in rule["ports"]]
    assert ports == [53, 53, port]


def test_monitors_find_the_metrics() -> None:
    documents = render(CHARTS["serving"], CI["serving/multi-gpu"][1])
    for of, name in (("server", "ictx-serving-metrics"), ("router", "ictx-serving-router")):
        monitor, service = component(documents, "ServiceMonitor", of), services(documents)[name]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"] == "metrics"
    documents = render(CHARTS["mlflow"], CI["mlflow/tls"][1])
    (endpoint,) = only(documents, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["basicAuth"]["password"] == {"name": "ictx-mlflow-auth", "key": "admin-password"}


@pytest.mark.attack(
    "L",
    "a pod in the cluster impersonates MLflow, or a backup pod is compromised",
    before="the chart's clients verified no certificate; pods of backup, gc, restore and test could reach everything",
    now="they verify the server with the platform's authority, and can reach only the server, DNS and the database",
)
def test_clients_in_the_cluster_verify_the_server_and_reach_nothing_else() -> None:
    values = {"tls.existingSecret": "mlflow-tls", "gc.enabled": True, "backup.enabled": True}
    documents = render(CHARTS["mlflow"], None, values)
    clients = {pod.owner: pod for pod in pods(documents) if not pod.owner.startswith("Deployment/")}
    for owner, name in (("Pod/ictx-mlflow-test", "ask"), ("CronJob/ictx-mlflow-gc", "gc")):
        container = clients[owner].container(name)
        assert environment(container)["MLFLOW_TRACKING_SERVER_CERT_PATH"] == "/etc/mlflow-ca/ca.crt"
        (volume,) = [volume for volume in clients[owner].spec["volumes"] if volume["name"] == "authority"]
        assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}], "only the server has the key"
    assert "INSECURE" not in json.dumps(documents)
    assert "unverified" not in json.dumps(documents)
    (jobs,) = [document for document in documents if name_of(document) == "NetworkPolicy/ictx-mlflow-jobs"]
    (expression,) = jobs["spec"]["podSelector"]["matchExpressions"]
    assert expression == {"key": "app.kubernetes.io/component", "operator": "NotIn", "values": ["server"]}
    for pod in clients.values():
        assert jobs["spec"]["podSelector"]["matchLabels"].items() <= pod.labels.items()
    assert jobs["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in jobs["spec"]
    assert [[port["port"] for port in rule["ports"]] for rule in jobs["spec"]["egress"]] == [["http"], [53, 53]]


def test_nobody_reaches_mlflow_whom_the_values_do_not_name() -> None:
    def peers(**values: Any) -> list[Any]:
        documents = render(CHARTS["mlflow"], None, {"metrics.annotations": True, **values})
        (policy,) = [document for document in documents if name_of(document) == "NetworkPolicy/ictx-mlflow"]
        (rule,) = policy["spec"]["ingress"]
        assert [port["port"] for port in rule["ports"]] == ["http", "metrics"]
        return list(rule["from"])

    (own,) = peers()
    assert own["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "ictx"
    block = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    assert peers(**{"networkPolicy.allowFrom": [block]}) == [own, block]


def test_mlflow_takes_the_certificate_of_its_authority_and_refuses_routes_without_a_rule() -> None:
    values = {
        "tls": {"existingSecret": "mlflow-tls", "revision": "abc"},
        "auth": {"freeAliases": ["candidate", "draft"]},
    }
    pod = server("mlflow", **values)
    container = pod.container("mlflow")
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert pod.annotations["ictx/certificate"] == "abc"
    assert environment(container)["MLFLOW_BASIC_AUTH_FAIL_CLOSED"] == "true"
    assert environment(container)["FREE_ALIASES"] == "candidate,draft"


def test_sqlite_has_one_server_and_jobs_beside_it() -> None:
    documents = render(CHARTS["mlflow"], CI["mlflow/sqlite"][1])
    assert only(documents, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert not [document for document in documents if document["kind"] == "Job"]
    selector = only(documents, "Deployment")["spec"]["selector"]["matchLabels"]
    jobs = [pod for pod in pods(documents) if pod.owner.startswith("CronJob/")]
    assert len(jobs) == 2
    for job in jobs:
        (term,) = job.spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["labelSelector"]["matchLabels"] == selector
    assert server("mlflow").container("prepare")["args"] == ["migrate", "auth-config"]


def test_postgresql_is_migrated_once_before_the_servers() -> None:
    documents = render(CHARTS["mlflow"], CI["mlflow/postgresql"][1])
    job = only(documents, "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    (pod,) = pods([job])
    assert pod.spec["serviceAccountName"] == "default"
    assert pod.container("migrate")["args"] == ["migrate"]
    assert server("mlflow", "postgresql").container("prepare")["args"] == ["auth-config"]
    assert only(documents, "Deployment")["spec"]["strategy"]["type"] == "RollingUpdate"
    assert not [document for document in documents if document["kind"] == "PersistentVolumeClaim"]


def test_mlflow_asks_for_a_password_and_knows_its_names() -> None:
    mlflow = server("mlflow", ingress={"enabled": True, "host": "m.example.org"}).container("mlflow")
    assert option(mlflow, "--app-name") == "basic-auth"
    assert environment(mlflow)["MLFLOW_AUTH_ADMIN_PASSWORD"] is None
    hosts = option(mlflow, "--allowed-hosts").split(",")
    for name in ("ictx-mlflow:*", "ictx-mlflow.ictx.svc.cluster.local", "m.example.org", "10.*", "172.31.*"):
        assert name in hosts
    assert "*" not in hosts
    mlflow = server("mlflow", server__allowPrivateAddresses=False).container("mlflow")
    assert "10.*" not in option(mlflow, "--allowed-hosts").split(",")


def test_a_restore_stops_the_server() -> None:
    documents = render(CHARTS["mlflow"], CI["mlflow/restore"][1])
    assert only(documents, "Deployment")["spec"]["replicas"] == 0
    assert only(documents, "CronJob")["spec"]["suspend"] is True
    grace = server("mlflow").spec["terminationGracePeriodSeconds"]
    (pod,) = pods([only(documents, "Job")])
    assert environment(pod.container("restore"))["SERVER_GRACE"] == str(grace)
    assert only(render(CHARTS["mlflow"]), "Deployment")["spec"]["replicas"] == 1


def test_uninstalling_loses_no_data() -> None:
    documents = render(CHARTS["mlflow"], None, {"backup.enabled": True})
    kept = {
        document["metadata"]["name"]
        for document in documents
        if document["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert kept == {"ictx-mlflow-data", "ictx-mlflow-backup", "ictx-mlflow-auth"}
    documents = render(CHARTS["serving"], None, {"storage.type": "pvc"})
    assert "annotations" not in only(documents, "PersistentVolumeClaim")["metadata"]


def test_tls_changes_probes_and_addresses() -> None:
    mlflow = server("mlflow", "tls").container("mlflow")
    assert mlflow["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert "--ssl-certfile=/etc/mlflow-tls/tls.crt" in option(mlflow, "--uvicorn-opts")


def notes(chart: str, tmp_path: Path, file: Path | None, values: Document) -> str:
    """Returns NOTES.txt as helm prints it; without a cluster, helm renders it only inside of an object."""
    copy = tmp_path / chart
    shutil.copytree(CHARTS[chart], copy)
    text = (copy / "templates" / "NOTES.txt").read_text()
    (copy / "templates" / "notes.yaml").write_text(
        '{{ define "notes" }}' + text + "{{ end }}\nkind: Notes\nmetadata: {name: notes}\n"
        'text: {{ include "notes" . | quote }}\n'
    )
    (copy / "templates" / "NOTES.txt").unlink()
    return str(only(render(copy, file, values), "Notes")["text"])


@pytest.mark.parametrize("ci", CI)
def test_the_notes_are_commands_that_a_shell_takes(ci: str, tmp_path: Path) -> None:
    chart, file = CI[ci]
    text = notes(chart, tmp_path, file, {})
    commands = "\n".join(
        line for line in text.splitlines() if line.startswith("   ") and "or run the test of" not in line
    )
    assert "kubectl" in commands
    done = subprocess.run(["bash", "-n"], input=commands, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + commands
    if chart == "serving":
        # An Ingress and a gateway have their own certificates.
        edge = {"Ingress", "HTTPRoute"} & {document["kind"] for document in render(CHARTS[chart], file)}
        authority = "" if edge else "--cacert ca.crt "
        request = '$ICTX_URL/v1/completions -H "Authorization: Bearer $ICTX_API_KEY"'
        assert f"curl -sS {authority}{request}" in commands
        assert "get secret" in commands


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("kind", ["NodePort", "LoadBalancer"])
@pytest.mark.parametrize(
    ("found", "host"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7 2001:db8::7", "192.0.2.7"),
        ("2001:db8::7", "[2001:db8::7]"),
        ("2001:db8::7 192.0.2.7", "[2001:db8::7]"),
        ("lb.example.org", "lb.example.org"),
    ],
)
def test_the_notes_find_the_address(chart: str, kind: str, found: str, host: str, tmp_path: Path) -> None:
    """Nodes have several addresses, Amazon's load balancers a name, IPv6 addresses need brackets in a URL."""
    lines = notes(chart, tmp_path, None, {"service.type": kind}).splitlines()
    names = ("NODE=", "PORT=", "export ICTX_URL=", "export MLFLOW_TRACKING_URI=")
    script = "\n".join(line for line in lines if line.strip().startswith(names))
    fake = f"kubectl() {{ case \"$*\" in *nodePort*) echo 31000;; *) printf '{found}';; esac; }}\n"
    shown = "\necho $ICTX_URL$MLFLOW_TRACKING_URI"
    done = subprocess.run(["bash", "-ec", fake + script + shown], capture_output=True, text=True, check=False)
    port = {"NodePort": 31000, "LoadBalancer": {"serving": 8000, "mlflow": 5000}[chart]}[kind]
    assert done.stdout.strip().partition("://")[2] == f"{host}:{port}", done.stderr


def test_the_notes_leave_the_certificate_of_an_ingress_to_the_client(tmp_path: Path) -> None:
    values = {"tls.existingSecret": "tls", "ingress": {"enabled": True, "host": "a.example.org", "tlsSecret": "edge"}}
    text = notes("mlflow", tmp_path, None, values)
    assert "export MLFLOW_TRACKING_URI=https://a.example.org" in text
    assert "ca.crt" not in text


def test_the_notes_find_mlflow_behind_a_gateway(tmp_path: Path) -> None:
    route = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["m.example.org"]}
    text = notes("mlflow", tmp_path, None, {"httpRoute": route, "tls.existingSecret": "tls"})
    assert "export MLFLOW_TRACKING_URI=http://m.example.org " in text
    assert "ca.crt" not in text


def test_the_notes_warn_of_a_gateway_that_sends_plain_http(tmp_path: Path) -> None:
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "a"}]}}
    warning = "set httpRoute.caConfigMap"
    assert warning in notes("serving", tmp_path / "a", None, route)
    assert warning not in notes("serving", tmp_path / "b", None, {**route, "tls.enabled": False})


def test_the_notes_read_the_key_where_it_is(tmp_path: Path) -> None:
    values = {"apiKey": {"existingSecret": "clients", "key": "the.key"}}
    text = notes("serving", tmp_path, None, values)
    assert "get secret clients -o go-template='{{ index .data \"the.key\" | base64decode }}'" in text
    assert "image.digest" in text


def test_helm_packages_no_more_than_it_needs(tmp_path: Path) -> None:
    for name, chart in CHARTS.items():
        helm("package", str(chart), "--destination", str(tmp_path))
        (package,) = tmp_path.glob(f"{name}-*.tgz")
        listed = subprocess.run(["tar", "tzf", str(package)], capture_output=True, text=True, check=True).stdout
        assert "/values.schema.json" in listed
        assert "/files/" in listed
        assert "/ci/" not in listed
