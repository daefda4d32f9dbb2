"""Weights and limits by adapter: what a file says, and that what is beyond a limit waits and does not fail."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from loramux_worker.engine.config import EngineConfig
from loramux_worker.errors import ConfigurationError
from loramux_worker.policy_file import read_policies
from loramux_worker.scheduler import AdapterPolicy, Policies, SchedulerConfig
from loramux_worker.settings_sources import load_settings
from unit.scheduler_support import FakeEngine

FILE = """
[[adapters]]
pattern = "acme/*"
weight = 4
tokens_per_second = 2000
max_running = 32

[[adapters]]
pattern = "base"
weight = 0.5
"""


def engine_with(*policies: AdapterPolicy, **values: int) -> FakeEngine:
    config = SchedulerConfig(**{"max_model_len": 64, **values})  # type: ignore[arg-type]
    return FakeEngine(config, policies=Policies(policies))


class TestFile:
    def test_the_first_pattern_that_matches_holds(self, tmp_path: Path) -> None:
        path = tmp_path / "policies.toml"
        path.write_text(FILE)
        policies = Policies([*read_policies(path), AdapterPolicy("*/support", weight=2.0)])
        assert policies.of("acme/support") == AdapterPolicy("acme/*", 4.0, 2000.0, 32)
        assert policies.of("other/support").weight == 2.0
        assert policies.of(None).weight == 0.5, "the base model"
        assert policies.of("base").weight == 1.0, "an adapter of that name"
        assert Policies([AdapterPolicy("*", weight=3.0)]).of(None).weight == 1.0, "only `base` is the base model"
        assert policies.of("Acme/support").weight == 2.0, "case matters"
        assert policies.of("other/tune") == AdapterPolicy("*")

    def test_an_engine_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "policies.toml"
        path.write_text(FILE)
        settings = load_settings(["--model", "gpt2", "--policy-file", str(path)])
        config = EngineConfig("gpt2", policies=settings.policies)
        assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
        assert [policy.pattern for policy in config.policies] == ["acme/*", "base"]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ('[[adapters]]\npattern = "a"\nwieght = 2', "unknown field `wieght`"),
            ("[[adapters]]\nweight = 2", "missing required field `pattern`"),
            ('[[adapters]]\npattern = "a"\nweight = 0', r"> 0.*adapters\[0\].weight"),
            ('[[adapters]]\npattern = "a"\nmax_running = 0', r">= 1.*adapters\[0\].max_running"),
            ('[[adapters]]\npattern = "a"\ntokens_per_second = "many"', "Expected `float.*got `str`"),
            ("adapters = 3", "Expected `array`"),
            ("[[adapters", "at the end of an array declaration"),
            ("pattern = \udcff", "utf-8"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, tmp_path: Path, text: str, reason: str) -> None:
        path = tmp_path / "policies.toml"
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ConfigurationError, match=f"--policy-file {path}: .*{reason}") as error:
            load_settings(["--model", "gpt2", "--policy-file", str(path)])
        assert "\n" not in str(error.value)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="No such file"):
            read_policies(tmp_path / "nowhere.toml")


class TestMaxRunning:
    def test_more_wait_and_all_are_answered(self) -> None:
        engine = engine_with(AdapterPolicy("a", max_running=2))
        for number in range(20):
            engine.add("ab"[number % 2], prompt=4, new=4)
        most = {"a": 0, "b": 0}
        while engine.scheduler.num_waiting or engine.scheduler.num_running:
            engine.step()
            running = [s.adapter_key[0] for s in engine.sequences.values() if s.block_table and s.adapter_key]
            most = {name: max(most[name], running.count(name)) for name in most}
        assert most == {"a": 2, "b": 10}
        assert len(engine.finished) == 20


class TestTokensPerSecond:
    """`FakeEngine` makes a step a second."""

    def test_the_rate_holds_in_the_long_run_and_nothing_fails(self) -> None:
        engine = engine_with(AdapterPolicy("slow", tokens_per_second=4.0))
        for _ in range(30):
            engine.add("slow", prompt=5, new=3)
        for _ in range(5):
            engine.add("free", prompt=5, new=3)
        engine.drain(200)
        assert len(engine.finished) == 35
        assert engine.num_steps == pytest.approx(30 * 8 / 4, abs=6)
        starts = [engine.started_at[number] for number in range(30)]
        assert starts == sorted(starts)
        assert all(later - sooner >= 1 for sooner, later in pairwise(starts[1:])), "it is even"
        assert all(engine.started_at[number] == 0 for number in range(30, 35)), "nobody else waits for it"

    def test_what_was_not_generated_is_given_back(self) -> None:
        engine = engine_with(AdapterPolicy("slow", tokens_per_second=10.0))
        for _ in range(3):
            engine.add("slow", prompt=5, new=45)
        for step in range(4):
            engine.step()
            for sequence in list(engine.sequences.values()):
                if sequence.block_table:  # it ends long before its 45 tokens
                    engine.scheduler.finish(sequence)
            assert len(engine.started_at) == min(3, 1 + step), "six tokens of ten a second: one a step"

    def test_being_away_saves_up_a_second_at_most(self) -> None:
        engine = engine_with(AdapterPolicy("slow", tokens_per_second=8.0))
        for _ in range(50):
            engine.step()
        for _ in range(10):
            engine.add("slow", prompt=4, new=4)
        for _ in range(4):
            engine.step()
        assert [engine.started_at[number] - 50 for number in range(5)] == [0, 0, 1, 2, 3]

    def test_a_deadline_ends_the_waiting(self) -> None:
        engine = engine_with(AdapterPolicy("slow", tokens_per_second=1.0))
        engine.add("slow", prompt=4, new=40)
        late = engine.add("slow", prompt=4, new=4, deadline=10.0)
        for _ in range(9):
            engine.step()
        assert engine.scheduler.expire(9.0) == []
        assert engine.scheduler.expire(10.0) == [late]
        engine.scheduler.check_integrity()

    def test_a_preempted_sequence_does_not_pay_twice(self) -> None:
        policies = Policies([AdapterPolicy("a", tokens_per_second=19.0)])
        engine = FakeEngine(SchedulerConfig(max_model_len=32), num_blocks=8, policies=policies)
        for _ in range(6):
            engine.add("a", prompt=7, new=12)
        engine.drain(200)
        assert len(engine.finished) == 6
        assert engine.services["a"] == 6 * (7 + 2 * 12)
