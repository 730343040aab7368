"""From the registry to a response: trained versions are served, rolls lose no request, failures are reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest
from helm import program
from kubernetes import client, config
from lab import ROOT, SHARED, STATE, Lab, wait_for
from recovery import Drill
from serving import MODEL, NAMESPACE, RELEASE, SERVER, Client, complete, key

pytestmark = pytest.mark.lab

# These versions fail on purpose or copy the served one, and no evaluation covers them.
PROMOTE = f"/opt/ictx/bin/ictx promote {{}} --alias champion --model {MODEL} --force --reason 'end-to-end tests'"


def run(*command: object, status: int = 0) -> str:
    """Returns the output of a command, with its errors."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def helm(*arguments: object) -> str:
    return run(program(), *arguments, "--kubeconfig", STATE / "kubeconfig", "--namespace", NAMESPACE)


def playbook(*arguments: str, status: int = 0) -> str:
    return run(ROOT / ".venv/bin/ansible-playbook", *arguments, status=status)


@pytest.fixture(scope="module")
def core() -> client.CoreV1Api:
    config.load_kube_config(str(STATE / "kubeconfig"))
    return client.CoreV1Api()


def server(core: client.CoreV1Api) -> Any:
    """Returns the serving pod; during a roll, the one that is not terminating."""
    pods = core.list_namespaced_pod(NAMESPACE, label_selector=SERVER).items
    (pod,) = [pod for pod in pods if not pod.metadata.deletion_timestamp]
    return pod


def pods(core: client.CoreV1Api, labels: str) -> set[str]:
    """Returns the names of pods."""
    return {pod.metadata.name for pod in core.list_namespaced_pod(NAMESPACE, label_selector=labels).items}


def last_words(core: client.CoreV1Api, namespace: str) -> list[str]:
    """Returns the termination messages of the init containers that failed."""
    pods = core.list_namespaced_pod(namespace, label_selector=SERVER).items
    states = [state for pod in pods for state in pod.status.init_container_statuses or []]
    ends = [end for state in states for end in (state.state.terminated, state.last_state.terminated) if end]
    return [end.message or "" for end in ends if end.exit_code]


@dataclass(frozen=True)
class Registry:
    """The lab's MLflow server, through its own client."""

    def run(self, script: str, *arguments: str) -> Any:
        """Returns the JSON in the last line of a Python script; `client` is an MlflowClient of the administrator."""
        begin = "import json, sys\nfrom mlflow import MlflowClient\nclient = MlflowClient()\n"
        done = subprocess.run(
            [ROOT / ".venv-workload/bin/python", "-c", begin + script, *arguments],
            env={**os.environ, **Lab().tracking()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def alias(self, name: str) -> str:
        """Returns the version of an alias of the model."""
        script = "print(json.dumps(str(client.get_model_version_by_alias(sys.argv[1], sys.argv[2]).version)))"
        return str(self.run(script, MODEL, name))

    def register(self, change: str) -> str:
        """Registers the served model again after `change` (Python; `folder` is its path); returns the version."""
        script = f"""
import pathlib, tempfile
from mlflow.artifacts import download_artifacts
version = client.get_model_version_by_alias(sys.argv[1], "champion")
source = client.get_model_version_download_uri(sys.argv[1], version.version)
folder = pathlib.Path(download_artifacts(source, dst_path=tempfile.mkdtemp()))
{change}
run = client.create_run(client.get_run(version.run_id).info.experiment_id)
client.log_artifacts(run.info.run_id, str(folder), "model")
made = client.create_model_version(sys.argv[1], run.info.artifact_uri + "/model", run.info.run_id)
client.set_terminated(run.info.run_id)
print(json.dumps(str(made.version)))
"""
        return str(self.run(script, MODEL))


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="module", autouse=True)
def served(lab: Lab, registry: Registry) -> str:
    """The served version: the newest that a job of the lab registered; trains one if there is none."""
    results = [json.loads(path.read_text()) for path in SHARED.glob("runs/researcher/*/result.json")]
    if not any(result.get("model_version") and result.get("mlflow_run_id") for result in results):
        status, output = lab.follow(lab.submit())
        assert status == 0, output[-3000:]
    lab.user(PROMOTE.format("candidate"))
    playbook("playbooks/serving.yml")
    return registry.alias("champion")


def test_the_endpoint_answers_with_the_key_and_only_with_it() -> None:
    status, text = complete(key())
    assert status == 200, text
    assert json.loads(text)["usage"]["completion_tokens"] == 8
    assert [complete(secret)[0] for secret in ("", "not-the-key")] == [401, 401]


def test_completions_stream() -> None:
    status, text = complete(key(), stream=True)
    events = [line for line in text.splitlines() if line.startswith("data: ")]
    assert (status, events[-1]) == (200, "data: [DONE]")
    assert len(events) > 4


def test_log_probabilities_are_returned() -> None:
    """vLLM compiles a function for them at their first request, and the image has no compiler."""
    status, text = complete(key(), logprobs=1)
    assert status == 200, text
    (choice,) = json.loads(text)["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 8


@pytest.mark.parametrize("release", ["ictx", "ictx-mlflow"])
def test_the_charts_test_themselves(release: str) -> None:
    assert "Phase:          Succeeded" in helm("test", release, "--timeout", "10m")


def test_pods_run_as_nobody_in_particular_on_a_root_that_cannot_be_written(core: client.CoreV1Api) -> None:
    for pod in core.list_namespaced_pod(NAMESPACE).items:
        assert pod.spec.security_context.run_as_non_root
        assert pod.spec.automount_service_account_token is False
        for container in [*pod.spec.containers, *(pod.spec.init_containers or [])]:
            assert container.security_context.read_only_root_filesystem, (pod.metadata.name, container.name)
            assert "@sha256:" in container.image


def test_digests_and_version_are_on_the_pod_and_on_the_run(
    core: client.CoreV1Api, registry: Registry, served: str
) -> None:
    script = """
version = client.get_model_version_by_alias(sys.argv[1], "champion")
print(json.dumps({**client.get_run(version.run_id).data.tags}))
"""
    tags, pod = registry.run(script, MODEL), server(core)
    image = json.loads((STATE / "images/serving.json").read_text())
    assert tags["ictx.model_version"] == f"{MODEL}/{served}"
    assert tags["ictx.serving_image_digest"] == image["digest"]
    assert pod.metadata.labels["ictx/model-version"] == served
    assert pod.metadata.annotations["ictx/training-image-digest"] == tags["ictx.image_digest"]
    assert pod.metadata.annotations["ictx/image-digest"] == image["digest"]


@pytest.mark.full
def test_a_promoted_version_is_served_and_no_request_fails(
    core: client.CoreV1Api, registry: Registry, lab: Lab, steady: Client
) -> None:
    before = server(core).metadata.name
    version = registry.register("")
    lab.user(PROMOTE.format(version))
    wait_for("the first answers", lambda: steady.answered > 2)
    playbook("playbooks/serving.yml")
    wait_for("the old pod's end", lambda: len(core.list_namespaced_pod(NAMESPACE, label_selector=SERVER).items) == 1)
    answered = steady.answered
    wait_for("answers of the new pod", lambda: steady.answered > answered + 2)
    pod = server(core)
    assert pod.metadata.name != before
    assert pod.metadata.labels["ictx/model-version"] == version
    assert steady.failures == []


def test_a_version_without_evaluations_is_not_promoted(registry: Registry, lab: Lab) -> None:
    before, version = registry.alias("champion"), registry.register("")
    done = lab.run("ctl", PROMOTE.format(version).partition(" --force")[0], user="researcher")
    assert (done.returncode, registry.alias("champion")) == (3, before)
    assert f"models:/{MODEL}/{version} is rejected: perplexity is not measured: ictx eval perplexity" in done.stderr


def test_a_damaged_version_is_not_promoted(registry: Registry, lab: Lab) -> None:
    before = registry.alias("champion")
    version = registry.register("file = folder / 'model.safetensors'; file.write_bytes(file.read_bytes()[:-64])")
    done = lab.run("ctl", PROMOTE.format(version), user="researcher")
    assert done.returncode == 2
    assert f"model.safetensors of version {version} does not have the checksum" in done.stderr
    assert registry.alias("champion") == before


@pytest.mark.full
@pytest.mark.drill(
    "a version that the server cannot load is promoted",
    keeps="every request of a steady client; the previous version keeps serving",
    acts="/opt/ictx/bin/ictx promote VERSION --alias champion; ansible-playbook playbooks/serving.yml",
)
def test_a_model_that_cannot_be_served_is_reported_and_the_one_before_serves_on(
    registry: Registry, lab: Lab, steady: Client, drill: Drill
) -> None:
    change = """
(folder / "SHA256SUMS").unlink()
file = folder / "config.json"
file.write_text(file.read_text().replace('"kv_lora_rank": 512', '"kv_lora_rank": 256'))
"""
    good, bad = registry.alias("champion"), registry.register(change)
    reason = "has kv_lora_rank 256: vLLM serves latent attention with kv_lora_rank 512 only"
    lab.user(PROMOTE.format(bad))
    try:
        # Much faster than the release's timeout: the playbook does not wait for a container that fails repeatedly.
        printed = playbook("playbooks/serving.yml", status=2)
    finally:
        lab.user(PROMOTE.format(good))
    printed = " ".join(printed.split())
    assert "a container failed three times in a row" in printed
    assert re.search(reason, printed), printed[-3000:]
    assert "the previous revision is deployed again" in printed
    with drill.recovery():
        playbook("playbooks/serving.yml")
    assert steady.answered > 0
    assert steady.failures == []


@pytest.mark.full
@pytest.mark.drill(
    "helm is killed during an upgrade of the served release",
    keeps="every request of a steady client",
    acts="ansible-playbook playbooks/serving.yml",
)
def test_a_release_that_was_cut_off_is_repaired(steady: Client, drill: Drill) -> None:
    def status() -> str:
        return str(json.loads(helm("status", RELEASE, "--output", "json"))["info"]["status"])

    command = [program(), "upgrade", RELEASE, ROOT / "charts/serving", "--reuse-values", "--set", "vllm.maxNumSeqs=2",
               "--wait", "--kubeconfig", STATE / "kubeconfig", "--namespace", NAMESPACE]  # fmt: skip
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL) as cut_off:
        wait_for("the mark of an upgrade", lambda: status() == "pending-upgrade")
        cut_off.kill()
    with drill.recovery():
        playbook("playbooks/serving.yml")
    assert status() == "deployed"
    answered = steady.answered
    wait_for("another answer", lambda: steady.answered > answered)
    assert steady.failures == []


@pytest.mark.full
def test_an_alias_that_does_not_exist_changes_nothing(core: client.CoreV1Api) -> None:
    before = server(core).metadata.name
    printed = playbook("playbooks/serving.yml", "-e", '{"_serving_alias": "nobody"}')
    assert f"models:/{MODEL}@nobody does not exist: nothing is deployed" in printed
    assert server(core).metadata.name == before


@pytest.mark.full
@pytest.mark.drill(
    "MLflow is down while a playbook rolls out a model",
    keeps="every request of a steady client; the served version",
    acts="nobody",
)
def test_a_registry_that_is_down_is_named_and_the_model_serves_on(
    core: client.CoreV1Api, steady: Client, drill: Drill
) -> None:
    apps = client.AppsV1Api()

    def scale(replicas: int) -> None:
        apps.patch_namespaced_deployment_scale("ictx-mlflow", NAMESPACE, {"spec": {"replicas": replicas}})
        wait_for(
            f"{replicas} pods of MLflow",
            lambda: (apps.read_namespaced_deployment("ictx-mlflow", NAMESPACE).status.ready_replicas or 0) == replicas,
        )

    scale(0)
    try:
        printed = playbook("playbooks/serving.yml", status=2)
    finally:
        with drill.recovery():
            scale(1)
    printed = " ".join(printed.split())
    assert re.search(r"MLflow at https?://\S+:30500 did not answer.*the served version stays", printed), printed
    answered = steady.answered
    wait_for("another answer", lambda: steady.answered > answered)
    assert steady.failures == []


@pytest.mark.full
def test_by_hand_as_the_readme_says(core: client.CoreV1Api) -> None:
    def by_hand(*words: str) -> str:
        return run(program(), *words, "--kubeconfig", STATE / "kubeconfig", "--timeout", "15m")

    values = ["charts/serving", "-f", "charts/serving/ci/cpu.yaml"]
    try:
        by_hand("install", "ictx", *values, "--wait")
        by_hand("test", "ictx")
        by_hand("upgrade", "ictx", *values, "--set", "vllm.maxNumSeqs=2", "--wait")
        (pod,) = [pod for pod in core.list_namespaced_pod("default", label_selector=SERVER).items
                  if not pod.metadata.deletion_timestamp]  # fmt: skip
        (container,) = pod.spec.containers
        assert container.args[container.args.index("--max-num-seqs") + 1] == "2"
        by_hand("upgrade", "ictx", *values, "--set", "model.alias=nobody")
        wait_for("the reason", lambda: any("@nobody does not exist" in words for words in last_words(core, "default")))
        assert core.read_namespaced_pod(pod.metadata.name, "default").status.container_statuses[0].ready
        by_hand("rollback", "ictx", "1", "--wait")
    finally:
        by_hand("uninstall", "ictx", "--wait")
    assert core.list_namespaced_persistent_volume_claim("default").items == [], "the model's volume is an emptyDir"


@pytest.mark.full
@pytest.mark.drill("MLflow's pod is killed while a job logs to it", keeps="every metric of every step", acts="nobody")
def test_a_training_loses_no_metric_when_mlflow_goes_away(
    core: client.CoreV1Api, registry: Registry, lab: Lab, drill: Drill
) -> None:
    steps = 60
    job = lab.submit("pretrain/tiny.yaml", f"train.steps={steps}", "train.log_every=1", "train.checkpoint_every=5",
                     "train.validate_every=30", "run.model_name=")  # fmt: skip
    lab.wait_in(job, "the first checkpoint", lambda: (lab.folder(job) / "mlflow_sent_step").exists())
    labels = "app.kubernetes.io/instance=ictx-mlflow,app.kubernetes.io/component=server"
    (pod,) = core.list_namespaced_pod(NAMESPACE, label_selector=labels).items
    apps = client.AppsV1Api()
    with drill.recovery():
        core.delete_namespaced_pod(pod.metadata.name, NAMESPACE, grace_period_seconds=0)
        wait_for("its end", lambda: pod.metadata.name not in pods(core, labels))
        wait_for(
            "another pod of MLflow",
            lambda: apps.read_namespaced_deployment("ictx-mlflow", NAMESPACE).status.ready_replicas == 1,
        )
    status, output = lab.follow(job)
    assert status == 0, output[-3000:]
    script = "print(json.dumps([[m.step, m.value] for m in client.get_metric_history(sys.argv[1], 'loss')]))"
    logged = registry.run(script, lab.result(job)["mlflow_run_id"])
    assert logged == [[record["step"], record["loss"]] for record in lab.records(job)]
    assert [step for step, _ in logged] == list(range(1, steps + 1))
    assert "MLflow does not answer" in output, "no request was sent while the pod was down"


def test_people_log_as_themselves_with_a_password_that_root_keeps(lab: Lab) -> None:
    file = "/etc/ictx/mlflow/researcher.env"
    assert lab.run("n1", f"stat -c '%U %G %a' {file}").stdout.split() == ["root", "researcher", "440"]
    assert lab.run("n1", f"runuser -u nobody -- cat {file}").returncode != 0
    password = (STATE / "secrets/mlflow_user_researcher").read_text().strip()
    assert password in lab.run("n1", f"cat {file}").stdout
