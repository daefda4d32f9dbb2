"""deploy/kubernetes, rendered: valid for Kubernetes and its operators, and in step with the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from conftest import installed
from deploy.manifests import (
    DEPLOY,
    Manifest,
    containers,
    environment,
    of_kind,
    quantity,
    rendered,
    settings,
    the,
    worker,
)
from loramux_worker.kafka.topics import NEW_TOPIC_PARTITIONS
from loramux_worker.settings import WorkerSettings

OVERLAYS = ["overlays/demo", "overlays/gpu", "overlays/second-model"]
FOLDERS = [*OVERLAYS, "kafka"]
# After the drain: the last commit, leaving the group, the producers' farewell, the engines' end.
LEAVE_SECONDS = 45
SCHEMAS = yaml.safe_load((Path(__file__).with_name("custom_resources.yaml")).read_text())


@pytest.fixture(scope="session")
def render() -> Any:
    with installed():
        rendered("kafka")
    return rendered


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, render: Any) -> list[Manifest]:
    return render(request.param)


def test_every_folder_with_a_deployment_or_topics_is_looked_at() -> None:
    there = {str(p.parent.relative_to(DEPLOY / "kubernetes")) for p in DEPLOY.glob("kubernetes/**/kustomization.yaml")}
    assert there == {*FOLDERS, "base", "components/shared-disk"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_resource_is_valid(folder: str, render: Any) -> None:
    for manifest in render(folder):
        name = f"{manifest['apiVersion']}/{manifest['kind']}"
        if name in SCHEMAS:
            schema = {**SCHEMAS[name], "$defs": SCHEMAS["$defs"]}
            Draft202012Validator.check_schema(schema)
            errors = list(Draft202012Validator(schema).iter_errors(manifest["spec"]))
            assert not errors, f"{name} {manifest['metadata']['name']}: {errors[0].json_path}: {errors[0].message}"
        else:
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_field_is_told(render: Any) -> None:
    for kind, schema in SCHEMAS.items():
        if kind != "$defs":
            errors = Draft202012Validator({**schema, "$defs": SCHEMAS["$defs"]}).iter_errors({"misspelt": 1})
            assert any("misspelt" in error.message for error in errors), kind
    deployment = the(render("overlays/gpu"), "Deployment")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**deployment, "misspelt": 1}, kubernetes_validate.latest_version(), strict=True)


def test_names_that_resources_call_one_another_by_are_there(overlay: list[Manifest], render: Any) -> None:
    pod, container = worker(overlay)
    shared = render("kafka")
    scaled = the(overlay, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == the(overlay, "Deployment")["metadata"]["name"]
    assert pod["serviceAccountName"] == the(overlay, "ServiceAccount")["metadata"]["name"]
    authentication = the(shared, "TriggerAuthentication", scaled["triggers"][0]["authenticationRef"]["name"])["spec"]
    [user] = authentication["configMapTargetRef"]
    assert the(shared, "ConfigMap", user["name"])["data"][user["key"]] == authentication["secretTargetRef"][0]["name"]
    # Strimzi writes a secret of each user's name.
    users = {each["metadata"]["name"] for each in of_kind(shared, "KafkaUser")}
    [password] = [each["valueFrom"]["secretKeyRef"]["name"] for each in container["env"]]
    assert {password, authentication["secretTargetRef"][0]["name"]} <= users
    assert environment(overlay)["LORAMUX_SASL_USERNAME"] == password
    mounted = {mount["name"] for each in containers(pod) for mount in each["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_selectors_choose_the_pods_of_this_model_alone(render: Any) -> None:
    labels = []
    for folder in OVERLAYS:
        overlay = render(folder)
        pods = the(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"]
        for chosen in (
            the(overlay, "Deployment")["spec"]["selector"],
            the(overlay, "PodDisruptionBudget")["spec"]["selector"],
            the(overlay, "PodMonitor")["spec"]["selector"],
            the(overlay, "NetworkPolicy")["spec"]["podSelector"],
        ):
            assert chosen == {"matchLabels": pods}
        assert the(overlay, "PodMonitor")["spec"]["jobLabel"] in pods
        labels.append(tuple(pods.items()))
    assert len(set(labels)) == len(OVERLAYS)


def test_variables_are_settings_and_their_values_are_valid(overlay: list[Manifest], tmp_path: Path) -> None:
    _, container = worker(overlay)
    assert container["args"][0] == "worker"
    chosen = settings(environment(overlay), container["args"][1:], tmp_path)
    chosen.connection.model_dump()
    assert chosen.connection.security_protocol == "SASL_SSL"


def test_a_pod_is_given_time_to_drain(overlay: list[Manifest], tmp_path: Path) -> None:
    pod, _ = worker(overlay)
    drain = settings(environment(overlay), [], tmp_path).drain_timeout
    assert pod["terminationGracePeriodSeconds"] >= drain + LEAVE_SECONDS


def test_probes_ask_where_the_worker_answers(overlay: list[Manifest]) -> None:
    _, container = worker(overlay)
    [port] = container["ports"]
    assert port["containerPort"] == WorkerSettings.model_fields["http_port"].default
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    [endpoint] = the(overlay, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    [allowed] = the(overlay, "NetworkPolicy")["spec"]["ingress"]
    assert [each["port"] for each in allowed["ports"]] == [port["name"]]


def test_pods_may_do_no_more_than_they_must(overlay: list[Manifest]) -> None:
    pod, container = worker(overlay)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert not pod["enableServiceLinks"]  # a Service `loramux-http` would set LORAMUX_HTTP_PORT
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for each in containers(pod):
        assert each["securityContext"]["readOnlyRootFilesystem"]
        assert not each["securityContext"]["allowPrivilegeEscalation"]
        assert each["resources"]["limits"]["memory"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/cache", "/tmp"}


def test_tiers_fit_into_what_a_pod_has(overlay: list[Manifest], tmp_path: Path) -> None:
    pod, container = worker(overlay)
    chosen = settings(environment(overlay), [], tmp_path)
    limit = quantity(container["resources"]["limits"]["memory"])
    if chosen.device == "cuda":
        assert chosen.host_memory is not None, "the worker would measure the host's memory, not the container's"
        assert chosen.host_memory <= 0.6 * limit
    [cache] = [volume for volume in pod["volumes"] if volume["name"] == "cache"]
    assert cache.get("hostPath") or chosen.disk_quota <= 0.85 * quantity(cache["emptyDir"]["sizeLimit"])


def test_a_gpu_a_pod_and_a_pod_a_gpu(render: Any) -> None:
    for folder in ("overlays/gpu", "overlays/second-model"):
        _, container = worker(render(folder))
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert environment(render(folder))["LORAMUX_ENGINES"] == "1"


def test_models_do_not_share_what_adapter_ids_name(render: Any) -> None:
    """Two base models may have adapters of one id: their group, topic, store and disk tier are their own."""
    one, other = render("overlays/gpu"), render("overlays/second-model")
    for name in ("LORAMUX_GROUP_ID", "LORAMUX_REQUESTS_TOPIC", "LORAMUX_ADAPTER_URI"):
        assert environment(one)[name] != environment(other)[name]
    folders = [v["hostPath"]["path"] for m in (one, other) for v in worker(m)[0]["volumes"] if "hostPath" in v]
    assert len(set(folders)) == 2


def test_keda_scales_the_workers_by_their_own_lag(overlay: list[Manifest], render: Any, tmp_path: Path) -> None:
    chosen = settings(environment(overlay), [], tmp_path)
    spec = the(overlay, "ScaledObject")["spec"]
    [trigger] = spec["triggers"]
    assert spec["minReplicaCount"] == 0
    assert trigger["metadata"]["consumerGroup"] == chosen.group_id
    assert trigger["metadata"]["topic"] == chosen.requests_topic
    assert trigger["metadata"]["bootstrapServers"] == chosen.bootstrap_servers
    assert trigger["metadata"]["limitToPartitionsWithLag"] == "true"
    assert "excludePersistentLag" not in trigger["metadata"]
    assert trigger["metadata"]["offsetResetPolicy"] == "earliest"
    assert int(trigger["metadata"]["lagThreshold"]) < chosen.look_ahead
    topic = topics_of(overlay) | topics_of(render("kafka"))
    assert spec["maxReplicaCount"] <= topic[chosen.requests_topic]["partitions"]


def topics_of(manifests: list[Manifest]) -> dict[str, Any]:
    topics = of_kind(manifests, "KafkaTopic")
    return {each["spec"].get("topicName", each["metadata"]["name"]): each["spec"] for each in topics}


def test_topics_are_those_of_the_worker(overlay: list[Manifest], render: Any, tmp_path: Path) -> None:
    shared = topics_of(render("kafka"))
    defaults = {field.default for name, field in WorkerSettings.model_fields.items() if name.endswith("_topic")}
    assert defaults <= set(shared)
    chosen = settings(environment(overlay), [], tmp_path)
    there = shared | topics_of(overlay)
    for name in WorkerSettings.model_fields:
        if name.endswith("_topic"):
            assert getattr(chosen, name) in there


def test_topics_keep_requests_and_bound_what_is_unpacked(render: Any) -> None:
    shared = topics_of(render("kafka"))
    for name, spec in shared.items():
        assert spec["config"]["min.insync.replicas"] < spec["replicas"], name  # one broker may be lost
    requests = {**shared, **topics_of(render("overlays/second-model"))}
    for name in ("lora.requests", "lora.requests.mistral-7b"):
        config = requests[name]["config"]
        assert config["compression.type"] == "uncompressed"
        assert config["max.message.bytes"] < shared["lora.dead-letters"]["config"]["max.message.bytes"]
        assert config["retention.ms"] >= 7 * 24 * 3600 * 1000
        assert requests[name]["partitions"] == NEW_TOPIC_PARTITIONS


def test_kafka_users_may_do_what_exactly_once_needs(overlay: list[Manifest], render: Any, tmp_path: Path) -> None:
    chosen = settings(environment(overlay), [], tmp_path)
    transactional = f"loramux.{chosen.group_id}.{chosen.requests_topic}.0"
    for user, needed in {
        "loramux-worker": [
            ("group", chosen.group_id, {"Read", "Describe"}),
            ("topic", chosen.requests_topic, {"Read", "Describe"}),
            ("topic", "lora.control", {"Read", "Describe"}),
            ("topic", chosen.replies_topic, {"Write", "Describe", "DescribeConfigs"}),
            ("topic", chosen.stream_topic, {"Write", "Describe", "DescribeConfigs"}),
            ("topic", chosen.dead_letter_topic, {"Write", "Describe", "DescribeConfigs"}),
            ("transactionalId", transactional, {"Write", "Describe"}),
            ("cluster", None, {"IdempotentWrite"}),
        ],
        "loramux-client": [
            ("topic", chosen.requests_topic, {"Write", "Describe"}),
            ("topic", "lora.control", {"Write", "Describe"}),
            ("topic", chosen.replies_topic, {"Read", "Describe"}),
            ("topic", chosen.stream_topic, {"Read", "Describe"}),
            ("topic", chosen.dead_letter_topic, set()),
            ("group", chosen.group_id, set()),
            ("transactionalId", transactional, set()),
        ],
        "loramux-scaler": [
            ("group", chosen.group_id, {"Describe"}),
            ("topic", chosen.requests_topic, {"Describe"}),
            ("topic", chosen.replies_topic, set()),
        ],
    }.items():
        for kind, name, operations in needed:
            assert allowed(the(render("kafka"), "KafkaUser", user), kind, name) == operations, (user, kind, name)


def allowed(user: Manifest, kind: str, name: str | None) -> set[str]:
    operations: set[str] = set()
    for acl in user["spec"]["authorization"]["acls"]:
        resource = acl["resource"]
        if resource["type"] == kind and (
            name is None
            or resource["name"] == name
            or (resource["patternType"] == "prefix" and name.startswith(resource["name"]))
        ):
            operations |= set(acl["operations"])
    return operations
