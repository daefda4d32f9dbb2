"""A worker that cannot start says why in one line and ends with exit code 2."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BloomConfig

from services.kafka import KafkaCluster
from services.process import free_port
from services.serving import new_topics
from services.worker import WorkerProcess
from tiny_models import TinyModel, make_model, save_tokenizer

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=0)


def last_line(servers: str, model: Path, **flags: object) -> str:
    """What a worker with these flags says last, before it ends with exit code 2."""
    with WorkerProcess(servers, model, wait=False, **flags) as worker:
        assert worker.server.wait(120) == 2
        return worker.log_path.read_text().strip().splitlines()[-1]


def test_no_broker(model: TinyModel) -> None:
    servers = f"127.0.0.1:{free_port()}"
    assert "--bootstrap-servers" in last_line(servers, model.path, startup_timeout="1s")


def test_a_missing_topic(kafka: KafkaCluster, model: TinyModel) -> None:
    line = last_line(kafka.bootstrap_servers, model.path, requests_topic="no-such-topic")
    assert line.startswith("loramux: --requests-topic: there is no topic 'no-such-topic'")
    assert "--create-topics" in line


def test_a_model_that_is_not_served(kafka: KafkaCluster, tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    line = last_line(kafka.bootstrap_servers, tmp_path, **new_topics(kafka, 1))
    assert line.startswith("loramux: --model: BloomForCausalLM")


def test_a_cache_that_cannot_be_written(kafka: KafkaCluster, model: TinyModel) -> None:
    line = last_line(kafka.bootstrap_servers, model.path, disk_cache="/proc/loramux", **new_topics(kafka, 1))
    assert line.startswith("loramux: --disk-cache")


def test_a_preloaded_adapter_that_is_not_there(kafka: KafkaCluster, model: TinyModel, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/{{adapter_id}}"
    topics = new_topics(kafka, 1)
    line = last_line(kafka.bootstrap_servers, model.path, adapter_uri=uri, adapters="no/such", **topics)
    assert line.startswith("loramux: --adapters no/such")


def test_a_signal_before_it_is_ready(kafka: KafkaCluster, model: TinyModel) -> None:
    with WorkerProcess(kafka.bootstrap_servers, model.path, wait=False, **new_topics(kafka, 1)) as worker:
        worker.server.wait_until(lambda: has_engine(worker), seconds=60)
        worker.server.signal(signal.SIGTERM)
        assert worker.server.wait(60) == 0


def has_engine(worker: WorkerProcess) -> bool:
    """Whether the front has started its engine: from then on it hears signals."""
    return bool(Path(f"/proc/{worker.server.pid}/task/{worker.server.pid}/children").read_text().strip())
