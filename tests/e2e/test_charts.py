"""The lab's API server accepts every object that the charts render, in a dry run."""

from __future__ import annotations

import pytest
from helm import CHARTS, CI, name_of, render
from kubernetes import config
from kubernetes.client import ApiException
from kubernetes.dynamic import DynamicClient
from lab import STATE

pytestmark = [pytest.mark.lab, pytest.mark.full]

# Kinds of operators that the lab does not run; only Helm's lint checks their manifests.
CUSTOM = {"ServiceMonitor", "PodMonitor", "ScaledObject", "HTTPRoute"}


@pytest.fixture(scope="module")
def cluster() -> DynamicClient:
    return DynamicClient(config.new_client_from_config(str(STATE / "kubeconfig")))


@pytest.mark.parametrize("case", CI)
def test_the_api_server_takes_every_object(case: str, cluster: DynamicClient) -> None:
    chart, file = CI[case]
    version = cluster.version["kubernetes"]["gitVersion"].removeprefix("v").partition("+")[0]
    documents = [one for one in render(CHARTS[chart], file, kubernetes=version) if one["kind"] not in CUSTOM]
    assert documents
    for document in documents:
        resource = cluster.resources.get(api_version=document["apiVersion"], kind=document["kind"])
        # Another name, since an installed object of the same name would be a conflict.
        body = {**document, "metadata": {**document["metadata"], "name": f"dry-{document['metadata']['name']}"[:60]}}
        if document["kind"] == "Pod":  # admission requires an existing service account, and a dry run creates none
            body["spec"] = {**document["spec"], "serviceAccountName": "default"}
        try:
            resource.create(body=body, namespace="default", query_params=[("dryRun", "All")])
        except ApiException as error:
            pytest.fail(f"{name_of(document)}: {error.body}")
