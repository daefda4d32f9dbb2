"""`loramux plan`: its parts against known figures, its command line against mistakes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from loramux_producer.partitions import shard_partitions
from loramux_worker import cli
from loramux_worker.adapters.eviction import S3Fifo
from loramux_worker.planning.batching import MOST_SEQUENCES, Requests, Worker
from loramux_worker.planning.caching import hit_ratios
from loramux_worker.planning.costs import BATCHES, StepCosts, TierSpeeds
from loramux_worker.planning.placement import Placement, draw_shards
from loramux_worker.planning.popularity import read_counts, zipf
from loramux_worker.planning.shape import KNOWN, ModelShape
from loramux_worker.planning.tiers import TierBytes, found_in
from loramux_worker.planning.waiting import first_token

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def worker(shape: str = "8b", prompt: int = 64, new: int = 128, adapters: int = 1000) -> Worker:
    model = KNOWN[shape]
    return Worker(
        costs=StepCosts.of(model),
        requests=Requests(prompt=prompt, new=new),
        kv_bytes_per_token=model.kv_bytes_per_token,
        shares=zipf(adapters, 1.0),
        sizes=np.full(adapters, 16.0 * model.adapter_bytes_per_rank),
    )


@pytest.mark.parametrize("shape", ["8b", "1b"])
def test_the_costs_are_those_that_were_measured(shape: str) -> None:
    figures = orjson.loads((RESULTS / f"engine-{shape}.json").read_bytes())
    model, costs = KNOWN[shape], StepCosts.of(KNOWN[shape])
    assert model.step_bytes == pytest.approx(figures["weight_bytes"], rel=1e-3)
    assert 16 * model.adapter_bytes_per_rank == figures["adapter_bytes"]
    for row in figures["steps"]:
        place = BATCHES.index(row["batch"])
        if row["mix"] == "base":
            assert costs.base[place] == pytest.approx(row["step_ms"], abs=2e-3)
        if row["mix"] == "one":
            assert costs.step_ms(row["batch"], 0, 0, 128) == pytest.approx(row["step_ms"], abs=2e-3)
        if row["mix"] == "distinct":  # bytes at the rate of a copy
            further = (row["batch"] - 1) * figures["adapter_bytes"]
            assert costs.step_ms(row["batch"], further, 0, 128) == pytest.approx(row["step_ms"], rel=0.08)


@pytest.mark.parametrize(("shape", "ms"), [("8b", 60.07), ("1b", 13.88)])
def test_one_request_alone_takes_what_was_measured(shape: str, ms: float) -> None:
    batch = worker(shape, prompt=70, new=10).batch(1e-6)
    assert batch is not None
    assert batch.prefill_ms + 9 * batch.step_ms == pytest.approx(ms, rel=0.08)


def test_longer_contexts_are_read_too() -> None:
    model, costs = KNOWN["8b"], StepCosts.of(KNOWN["8b"])
    longer = costs.step_ms(64, 0, model.kv_bytes_per_token, 1128) - costs.step_ms(64, 0, model.kv_bytes_per_token, 128)
    assert longer == pytest.approx(64 * 1000 * 131_072 / costs.bytes_per_ms)


def test_batches_obey_littles_law_up_to_the_most() -> None:
    one = worker()
    most = one.most()
    assert one.batch(most * 1.01) is None
    batch = one.batch(most * 0.5)
    assert batch is not None
    decoding_seconds = one.requests.new * one.step_ms(batch.sequences) / 1e3
    busy = 1 - most * 0.5 * one.requests.prompt * one.costs.prompt_token / 1e3
    assert batch.sequences == pytest.approx(most * 0.5 * decoding_seconds / busy, rel=1e-3)
    nearly = one.batch(most * 0.999)
    assert nearly is not None
    assert batch.sequences < nearly.sequences <= MOST_SEQUENCES
    assert batch.step_ms < nearly.step_ms < nearly.step_p99_ms


@pytest.mark.parametrize(("exponent", "capacity"), [(0.8, 50), (1.0, 50), (1.0, 300), (1.2, 100)])
def test_hit_ratios_are_those_of_the_policy(exponent: float, capacity: int) -> None:
    shares, policy, here, hits = zipf(1000, exponent), S3Fifo[int](capacity), set[int](), 0
    trace = np.random.default_rng(1).choice(1000, 30_000, p=shares).tolist()
    for number, adapter in enumerate(trace):
        if adapter in here:
            policy.touch(adapter)
            hits += number >= 10_000
            continue
        if len(here) == capacity:
            victim = policy.evict(lambda key: True)
            assert victim is not None
            here.remove(victim)
        policy.add(adapter, 1)
        here.add(adapter)
    ratios = hit_ratios(shares, np.ones(1000), capacity)
    assert ratios.sum() == pytest.approx(capacity, rel=1e-3)  # it holds what it holds
    assert shares @ ratios == pytest.approx(hits / 20_000, abs=0.02)


def test_hit_ratios_of_what_all_fits_of_nothing_and_of_very_many() -> None:
    shares = np.array([0.5, 0.5, 0.0])
    assert hit_ratios(shares, np.array([2.0, 2.0, 9.0]), 4).tolist() == [1, 1, 0]
    assert hit_ratios(shares, np.ones(3), 0).tolist() == [0, 0, 0]
    many = hit_ratios(zipf(100_000, 0.9), np.full(100_000, 3.0), 3000.0)
    assert many.sum() == pytest.approx(1000, rel=1e-2)
    assert (np.diff(many) <= 1e-12).all()  # the more popular, the more hits


@pytest.mark.parametrize("room", [(50, 200, 500), (50, 500, 200), (0, 100, 1000)])
def test_every_request_finds_its_adapter_somewhere(room: tuple[int, int, int]) -> None:
    found = found_in(zipf(1000, 1.0), np.ones(1000), TierBytes(gpu=room[0], host=room[1], disk=room[2]))
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0


@pytest.mark.parametrize(("partitions", "k"), [(64, 2), (8, 8), (4, 9), (5000, 16)])
def test_an_adapter_owns_k_distinct_partitions(partitions: int, k: int) -> None:
    shards = draw_shards(500, partitions, k)
    assert shards.shape == (500, min(k, partitions))
    assert all(len(set(row)) == len(row) for row in shards.tolist())
    assert 0 <= shards.min() <= shards.max() < partitions


def test_drawn_shards_balance_like_rendezvous_hashing() -> None:
    shares = zipf(1000, 0.8)
    hashed = np.array([shard_partitions(f"tenant-{number}", 64, 4) for number in range(1000)])
    real = Placement(shares, hashed, np.arange(64) % 8).loads()
    drawn = [Placement.spread(shares, 64, 4, 8, seed).loads() for seed in range(20)]
    assert real.sum() == pytest.approx(1)
    assert min(loads.max() for loads in drawn) <= real.max() <= max(loads.max() for loads in drawn)


def test_a_workers_adapters_are_those_of_its_partitions() -> None:
    placement = Placement.spread(zipf(100, 1.0), 16, 2, 4)
    parts = [placement.of_worker(number) for number in range(4)]
    assert [shares.sum() for _, shares in parts] == pytest.approx(placement.loads().tolist())
    assert set(np.concatenate([adapters for adapters, _ in parts]).tolist()) == set(range(100))


def test_the_first_token_waits_for_where_its_adapter_is() -> None:
    batch = worker().batch(5.0)
    assert batch is not None
    near = first_token(batch, (1.0, 0.0, 0.0, 0.0), (0.0, 0.01, 0.1, 1.0))
    rare = first_token(batch, (0.95, 0.0, 0.0, 0.05), (0.0, 0.01, 0.1, 1.0))
    assert batch.prefill_ms < near.p50 < near.p99 <= batch.prefill_ms + batch.step_ms
    assert rare.p50 == pytest.approx(near.p50, rel=0.1)
    assert rare.p99 == pytest.approx(1000 + near.p50, rel=0.1)
    loads = TierSpeeds().load_seconds(84e6)
    assert list(loads) == sorted(loads)


def test_a_shape_comes_from_config_json(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "vocab_size": 32000}
    (tmp_path / "config.json").write_bytes(orjson.dumps(config))
    shape = ModelShape.find(str(tmp_path))
    assert shape.linears == KNOWN["1b"].linears
    assert shape.weight_bytes == KNOWN["1b"].weight_bytes
    assert ModelShape.find(str(tmp_path / "config.json")) == shape


def test_counts_are_read_with_and_without_names(tmp_path: Path) -> None:
    file = tmp_path / "counts.csv"
    file.write_text("adapter,count\nacme/a,1\nacme/b,3\n")
    assert read_counts(file).tolist() == [0.75, 0.25]
    file.write_text("2\n2\n")
    assert read_counts(file).tolist() == [0.5, 0.5]


def test_the_simulation_is_within_15_percent_of_a_measured_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    from fleet_metrics import WorkerMetrics

    tiers = orjson.loads((RESULTS / "tiers.json").read_bytes())
    weights = [1 / (number + 1) for number in range(1000)]
    trace = random.Random(1).choices(range(1000), weights, k=2000)  # as `bench_tiers.py` draws it
    ours = WorkerMetrics(gpu=50, host=200, disk=500, at_once=tiers["settings"]["at_once"]).run(trace)
    for tier, ratio in ours.items():
        assert ratio == pytest.approx(tiers["zipf"]["tiers"][tier]["hit_ratio"], rel=0.15), tier


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["loramux", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_it_says_gpus_tiers_hits_and_latencies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    picture = tmp_path / "plan.png"
    assert run(monkeypatch, "--adapters", "1000", "--rate", "20", "--plot", str(picture)) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 GPU,")
    for word in ("--adapter-memory", "--host-memory", "--disk-quota", "first token", "between tokens"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run(monkeypatch, "--adapters", "1000", "--rate", "200") == 0
    assert int(capsys.readouterr().out.split()[0]) > 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/no/such/folder"], "--model /no/such/folder"),
        (["--popularity", "/no/such/file.csv"], "--popularity /no/such/file.csv"),
        (["--popularity", "COUNTS"], "does not end with a count"),
        (["--rank", "0"], "--rank 0"),
        (["--rate", "5000", "--gpus", "1"], "--gpus 1: the busiest"),
        (["--rate", "3000"], "--shards"),
        (["--gpu-memory", "16"], "weights take 16.1 GB of a GPU's 16"),
        (["--partitions", "1", "--gpus", "2"], "--partitions 1"),
        (["--plot", "/no/such/folder/plan.png"], "--plot /no/such/folder/plan.png"),
    ],
)
def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    named: str,
) -> None:
    counts = tmp_path / "counts.csv"
    counts.write_text("a,1\nb,many\n")
    assert run(monkeypatch, *(str(counts) if argument == "COUNTS" else argument for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['matplotlib'] = None; sys.argv = ['loramux', 'plan']\n"
        "from loramux_worker.cli import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
