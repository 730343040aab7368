"""The charts' manifests are valid for every supported version of Kubernetes, and consistent."""

from __future__ import annotations

import base64
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from helm import CHARTS, CI, Document, HelmError, Pod, component, helm, name_of, only, pods, render
from kubernetes_validate import utils as schemas

# Kubernetes' schemas do not have these kinds; the tests below assert their content.
CUSTOM = {
    "BackendTLSPolicy": "Gateway API",
    "HTTPRoute": "Gateway API",
    "PodMonitor": "Prometheus Operator",
    "ScaledObject": "KEDA",
    "ServiceMonitor": "Prometheus Operator",
}
VERSIONS = [
    version for version in dict.fromkeys(schemas.all_versions()) if tuple(map(int, version.split("."))) >= (1, 29)
]
# API versions of 1.20, and the later ones with the same fields.
OLD = {"policy/v1beta1": "policy/v1", "batch/v1beta1": "batch/v1", "autoscaling/v2beta2": "autoscaling/v2"}

# Enables everything that is off by default, to render what the ci files do not.
EVERYTHING: dict[str, Document] = {
    "serving": {
        "autoscaling.type": "hpa",
        "storage.type": "pvc",
        "metrics": {"annotations": True, "serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}},
        "ingress": {"enabled": True, "host": "ictx.example.org"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "caConfigMap": "ictx-ca"},
        "adapters": {"enabled": True, "serve": [{"name": "a", "model": "models:/a/1"}]},
        "commonLabels": {"team": "research"},
        "podLabels": {"tier": "gold"},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "mlflow": {
        "backup.enabled": True,
        "gc.enabled": True,
        "restore.snapshot": "latest",
        "tls.existingSecret": "tls",
        "metrics": {"annotations": True, "serviceMonitor": {"enabled": True}},
        "ingress": {"enabled": True, "host": "mlflow.example.org"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["a.example.org"]},
        "commonLabels": {"team": "research"},
        "podLabels": {"tier": "gold"},
        "imagePullSecrets": [{"name": "registry"}],
    },
}
CASES: dict[str, tuple[Path, Path | None, Document]] = {
    **{name: (CHARTS[chart], file, {}) for name, (chart, file) in CI.items()},
    **{f"{name}/defaults": (chart, None, {}) for name, chart in CHARTS.items()},
    **{f"{name}/everything": (chart, None, EVERYTHING[name]) for name, chart in CHARTS.items()},
}
by_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module", autouse=True)
def _schemas_are_read_once() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "schema_contents", cache(schemas.schema_contents))
        yield


def documents_of(case: str, kubernetes: str = VERSIONS[-1]) -> list[Document]:
    chart, file, values = CASES[case]
    return render(chart, file, values, kubernetes)


def pods_of(case: str) -> list[Pod]:
    return list(pods(documents_of(case)))


def validate(document: Document, version: str) -> None:
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(str(item) for item in error.path)
        pytest.fail(f"{name_of(document)} for Kubernetes {version}: {where}: {error.message}")


def test_there_are_schemas_of_many_versions() -> None:
    assert VERSIONS[0] == "1.29.0"
    assert len(VERSIONS) >= 5


@pytest.mark.parametrize("version", VERSIONS)
@by_case
def test_manifests_are_valid(case: str, version: str) -> None:
    documents = documents_of(case, version)
    assert documents
    for document in documents:
        if document["kind"] not in CUSTOM:
            validate(document, version)


def test_validation_is_strict() -> None:
    document = only(documents_of("mlflow/defaults"), "Service")
    with pytest.raises(pytest.fail.Exception, match="sessionAfinity"):
        validate({**document, "spec": {**document["spec"], "sessionAfinity": "None"}}, VERSIONS[0])


@by_case
def test_manifests_suit_kubernetes_1_20(case: str) -> None:
    wanted = {
        "PodDisruptionBudget": "policy/v1beta1",
        "CronJob": "batch/v1beta1",
        "HorizontalPodAutoscaler": "autoscaling/v2beta2",
        "Ingress": "networking.k8s.io/v1",
    }
    for document in documents_of(case, "1.20.2"):
        kind, version = document["kind"], document["apiVersion"]
        assert version == wanted.get(kind, version), name_of(document)
        if kind not in CUSTOM:
            validate({**document, "apiVersion": OLD.get(version, version)}, VERSIONS[0])


def test_new_clusters_get_the_new_apis() -> None:
    serving, mlflow = documents_of("serving/everything"), documents_of("mlflow/everything")
    assert {d["apiVersion"] for d in serving if d["kind"] == "PodDisruptionBudget"} == {"policy/v1"}
    assert only(serving, "HorizontalPodAutoscaler")["apiVersion"] == "autoscaling/v2"
    assert {d["apiVersion"] for d in mlflow if d["kind"] == "CronJob"} == {"batch/v1"}


@pytest.mark.parametrize("ci", CI)
def test_helm_lint_is_content(ci: str) -> None:
    chart, file = CI[ci]
    helm("lint", "--strict", str(CHARTS[chart]), "--values", str(file))


@by_case
def test_every_pod_is_restricted(case: str) -> None:
    found = pods_of(case)
    assert found
    for pod in found:
        assert pod.spec["automountServiceAccountToken"] is False, pod.owner
        assert pod.spec["enableServiceLinks"] is False, pod.owner
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True, pod.owner
        assert context["runAsUser"] > 0, pod.owner
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), pod.owner
        assert not [volume for volume in pod.spec["volumes"] if "hostPath" in volume], pod.owner
        for container in pod.containers:
            where = f"{pod.owner}: {container['name']}"
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, where
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["runAsNonRoot"] is True, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert "privileged" not in context, where
            assert {"requests", "limits"} <= container["resources"].keys(), where
            assert "memory" in container["resources"]["limits"], where
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", where
    for account in [d for d in documents_of(case) if d["kind"] == "ServiceAccount"]:
        assert account["automountServiceAccountToken"] is False


@by_case
def test_secrets_are_in_secrets_only(case: str) -> None:
    documents = documents_of(case)
    secret = [base64.b64decode(v).decode() for d in documents if d["kind"] == "Secret" for v in d["data"].values()]
    secret = [value for value in secret if value != "admin"]
    assert all(len(value) >= 32 for value in secret)
    rest = str([document for document in documents if document["kind"] != "Secret"])
    assert not [value for value in secret if value in rest]
    for pod in pods(documents):
        for container in pod.containers:
            command = " ".join([*container.get("command", []), *container.get("args", [])])
            assert "$(" not in command, "an expanded variable is visible in the list of processes"
            for entry in container.get("env", []):
                if re.search(r"PASSWORD|SECRET|TOKEN|API_KEY$|^KEY$|ACCESS_KEY", entry["name"]):
                    assert set(entry.get("valueFrom", {})) == {"secretKeyRef"}, (pod.owner, entry)


@by_case
def test_a_pod_has_what_its_containers_name(case: str) -> None:
    for pod in pods_of(case):
        volumes = [volume["name"] for volume in pod.spec["volumes"]]
        assert len(volumes) == len(set(volumes)), pod.owner
        mounted = set()
        for container in pod.containers:
            where = f"{pod.owner}: {container['name']}"
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(paths) == len(set(paths)), where
            assert "/tmp" in paths, f"{where}: the root file system is read-only"
            mounted |= {mount["name"] for mount in container["volumeMounts"]}
            names = [entry["name"] for entry in container.get("env", [])]
            assert len(names) == len(set(names)), where
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "tcpSocket" in container.get(probe, {}):
                    assert container[probe]["tcpSocket"]["port"] in ports, where
                elif "exec" not in container.get(probe, {"exec": {}}):
                    assert container[probe]["httpGet"]["port"] in ports, where
        assert mounted == set(volumes), pod.owner


@by_case
def test_what_is_named_is_there_or_is_the_deployers(case: str) -> None:
    """Names without the release's name refer to existing objects, which the values set."""
    documents = documents_of(case)
    there = {name_of(document) for document in documents}
    for pod in pods(documents):
        named = {f"ServiceAccount/{pod.spec['serviceAccountName']}"}
        for volume in pod.spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                named.add(f"PersistentVolumeClaim/{claim['claimName']}")
        for container in pod.containers:
            references = [entry.get("valueFrom", {}).get("secretKeyRef") for entry in container.get("env", [])]
            named |= {f"Secret/{reference['name']}" for reference in references if reference}
        ours = {name for name in named if name.split("/")[1].startswith(("ictx-serving", "ictx-mlflow"))}
        # Secrets with the registry's password belong to the other release, or playbooks/serving.yml creates them.
        other = {"Secret/ictx-mlflow-auth", "Secret/ictx-serving-registry"} if case.startswith("serving/") else set()
        assert ours - there <= other, pod.owner


@by_case
def test_selectors_find_the_server_and_nothing_else(case: str) -> None:
    documents = documents_of(case)
    deployment = component(documents, "Deployment", "server")
    selector = deployment["spec"]["selector"]["matchLabels"]
    # If these change, installed releases cannot be upgraded.
    chart = case.split("/")[0]
    assert selector == {
        "app.kubernetes.io/name": chart,
        "app.kubernetes.io/instance": "ictx",
        "app.kubernetes.io/component": "server",
    }
    services = {name_of(document): document for document in documents if document["kind"] == "Service"}
    # With a router, clients reach only the router.
    router = {**selector, "app.kubernetes.io/component": "router"}
    through = {name for name in services if services[name]["spec"]["selector"] == router}
    routed = f"Deployment/ictx-{chart}-router" in {name_of(document) for document in documents}
    assert through == ({f"Service/ictx-{chart}", f"Service/ictx-{chart}-router"} if routed else set())
    for name in set(services) - through:
        assert services[name]["spec"]["selector"] == selector
        assert selector.items() <= services[name]["metadata"]["labels"].items()
    assert component(documents, "PodDisruptionBudget", "server")["spec"]["selector"]["matchLabels"] == selector
    policies = {name_of(document): document for document in documents if document["kind"] == "NetworkPolicy"}
    policy = policies[f"NetworkPolicy/{deployment['metadata']['name']}"]
    assert policy["spec"]["podSelector"]["matchLabels"] == selector
    matching = {pod.owner for pod in pods(documents) if selector.items() <= pod.labels.items()}
    assert matching == {name_of(deployment)}


@pytest.mark.parametrize("chart", CHARTS)
def test_a_new_chart_version_alone_rolls_no_pod(chart: str, tmp_path: Path) -> None:
    copy = tmp_path / chart
    shutil.copytree(CHARTS[chart], copy)
    about = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(re.sub(r"(?m)^version: .*", "version: 9.9.9", about))
    before, after = (only(render(path), "Deployment")["spec"]["template"] for path in (CHARTS[chart], copy))
    assert before == after


@by_case
def test_names_are_short_enough(case: str) -> None:
    """A CronJob's name has at most 52 characters, others 63, also with the longest name that the schema accepts."""
    chart, file, values = CASES[case]
    schema = json.loads((chart / "values.schema.json").read_text())
    long = {**values, "fullnameOverride": "x" * schema["properties"]["fullnameOverride"]["maxLength"]}
    for document in render(chart, file, long):
        assert len(document["metadata"]["name"]) <= (52 if document["kind"] == "CronJob" else 63), name_of(document)


@by_case
def test_the_digest_wins_over_the_tag(case: str) -> None:
    chart, file, values = CASES[case]
    digest = "sha256:" + "ab" * 32
    documents = render(chart, file, {**values, "image.digest": digest, "image.tag": "old"})
    for pod in pods(documents):
        assert {container["image"].partition("@")[2] for container in pod.containers} == {digest}, pod.owner
    server = next(pod for pod in pods(documents) if pod.owner.startswith("Deployment/"))
    assert server.labels["ictx/image-digest"] == "abababababab"
    assert server.annotations["ictx/image-digest"] == digest


@by_case
def test_labels_are_valid(case: str) -> None:
    value = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
    for document in documents_of(case):
        for key, text in document["metadata"]["labels"].items():
            assert value.fullmatch(text), (name_of(document), key)
    for pod in pods_of(case):
        for key, text in pod.labels.items():
            assert len(text) <= 63, (pod.owner, key)
            assert value.fullmatch(text), (pod.owner, key)


@by_case
def test_a_pod_may_take_as_long_as_its_hooks(case: str) -> None:
    deployment = component(documents_of(case), "Deployment", "server")
    (pod,) = pods([deployment])
    server = pod.spec["containers"][0]
    pre_stop = server["lifecycle"]["preStop"]["exec"]["command"]
    seconds = sum(int(word) for word in pre_stop if word.isdigit())
    assert pod.spec["terminationGracePeriodSeconds"] > seconds
    probe = server["startupProbe"]
    assert deployment["spec"]["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


def test_a_broken_chart_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HelmError):
        helm("lint", "--strict", str(tmp_path))
