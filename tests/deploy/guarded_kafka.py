"""A Kafka that lets everybody do what deploy/kubernetes/kafka allows them, as Strimzi would set it up."""

from __future__ import annotations

from typing import Any

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from deploy.manifests import Manifest, of_kind
from services.kafka import START_SECONDS, KafkaCluster
from services.process import free_port

RESOURCES = {
    "topic": (ResourceType.TOPIC, None),
    "group": (ResourceType.GROUP, None),
    "transactionalId": (ResourceType.TRANSACTIONAL_ID, None),
    "cluster": (ResourceType.BROKER, "kafka-cluster"),
}
OPERATIONS = {
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
    "IdempotentWrite": AclOperation.IDEMPOTENT_WRITE,
}


class GuardedKafka(KafkaCluster):
    """One broker. At `guarded_servers` one must say a password; `bootstrap_servers` is the operator's door."""

    def __init__(self) -> None:
        super().__init__()
        self._guarded_port = free_port()

    @property
    def guarded_servers(self) -> str:
        """`host:port` of the listener with SCRAM-SHA-512."""
        return f"127.0.0.1:{self._guarded_port}"

    def connection(self, user: str) -> dict[str, Any]:
        """Settings of a worker or a client that comes as this user."""
        return {
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_username": user,
            "sasl_password": password(user),
        }

    def aiokafka(self, user: str) -> dict[str, Any]:
        """The same for a client of aiokafka."""
        said = self.connection(user)
        return {
            "bootstrap_servers": self.guarded_servers,
            **{name.replace("sasl_user", "sasl_plain_user"): v for name, v in said.items() if "password" not in name},
            "sasl_plain_password": password(user),
        }

    def librdkafka(self, user: str) -> dict[str, Any]:
        """The same for librdkafka."""
        said = {name.replace("_", "."): value for name, value in self.connection(user).items()}
        return {"bootstrap.servers": self.guarded_servers, **said}

    def set_up(self, manifests: list[Manifest]) -> None:
        """The topics, users and ACLs of these manifests; each topic has one copy here."""
        admin = self.admin()
        for topic in of_kind(manifests, "KafkaTopic"):
            config = {name: str(value) for name, value in topic["spec"]["config"].items()} | {
                "min.insync.replicas": "1"
            }
            self.create_topic(topic["metadata"]["name"], min(4, topic["spec"]["partitions"]), config=config)
        for user in of_kind(manifests, "KafkaUser"):
            name = user["metadata"]["name"]
            scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
            change = UserScramCredentialUpsertion(name, scram, password(name).encode())
            wait_for(admin.alter_user_scram_credentials([change]))
            wait_for(admin.create_acls(bindings(user)))

    def _properties(self, i: int) -> str:
        doors = {"PLAINTEXT": self.ports[i], "CONTROLLER": self._controller_ports[i], "GUARDED": self._guarded_port}
        listeners = ",".join(f"{name}://127.0.0.1:{port}" for name, port in doors.items())
        more = {
            "listeners": listeners,
            "advertised.listeners": listeners,
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,GUARDED:SASL_PLAINTEXT",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.guarded.scram-sha-512.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            ),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        }
        return super()._properties(i) + "".join(f"{key}={value}\n" for key, value in more.items())


def bindings(user: Manifest) -> list[AclBinding]:
    """The ACLs of a KafkaUser as Kafka knows them."""
    made = []
    for acl in user["spec"]["authorization"]["acls"]:
        resource = acl["resource"]
        kind, name = RESOURCES[resource["type"]]
        prefix = resource.get("patternType") == "prefix"
        pattern = ResourcePatternType.PREFIXED if prefix else ResourcePatternType.LITERAL
        made += [
            AclBinding(
                kind,
                name or resource["name"],
                pattern,
                f"User:{user['metadata']['name']}",
                "*",
                OPERATIONS[operation],
                AclPermissionType.ALLOW,
            )
            for operation in acl["operations"]
        ]
    return made


def password(user: str) -> str:
    """What the operator would have drawn by lot."""
    return f"secret-of-{user}"


def wait_for(futures: dict[Any, Any]) -> None:
    """Returns when each is done; raises what one of them failed with."""
    for future in futures.values():
        future.result(START_SECONDS)


def admin_of(kafka: GuardedKafka, user: str) -> AdminClient:
    """An administration client that comes as this user."""
    return AdminClient(kafka.librdkafka(user))
