"""What experiments, clones and stores are called, and what a machine says of itself."""

import os

import pytest

from windquant import system_metrics, tracking_store
from windquant.errors import WindquantError


def test_names_of_experiments() -> None:
    found = tracking_store.Experiment.named("llama3.2-1b_2.5bits.ppo-chunk32-1")
    assert found.tags == {"model": "llama3.2-1b", "target_bits": "2.5", "allocator": "ppo-chunk32-1"}
    assert tracking_store.Experiment.named("llama3.2-1b").tags == {"model": "llama3.2-1b"}
    for name in ("", "m_2.0bits", "m_ppo", "m_2.0bits.ppo.json", "john's model"):
        with pytest.raises(WindquantError, match=r"--experiment .*: give a plan"):
            tracking_store.Experiment.named(name)


def test_no_password_is_handed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snakemake writes what it hands down on command lines."""
    for name in (tracking_store.CLONE, tracking_store.URI):
        monkeypatch.setenv(name, "")  # what is set from here on is forgotten behind the test
        monkeypatch.delenv(name)
    assert tracking_store.hand_down() == [tracking_store.CLONE]
    assert os.environ[tracking_store.CLONE] == tracking_store.clone()
    monkeypatch.setenv(tracking_store.URI, "https://mlflow.example.org")
    assert tracking_store.hand_down() == [tracking_store.CLONE, tracking_store.URI]
    for uri in ("https://me:secret@mlflow.example.org", "postgresql://me:a/b@c==@db/mlflow"):
        monkeypatch.setenv(tracking_store.URI, uri)
        assert tracking_store.hand_down() == [tracking_store.CLONE]
    assert tracking_store.without_password("postgresql://me:a/b@c==@db/mlflow") == "postgresql://db/mlflow"
    assert tracking_store.without_password("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"
    monkeypatch.setenv(tracking_store.CLONE, "john's clone")
    assert tracking_store.clone() == "john-s-clone"


def test_system_metrics() -> None:
    seen: list[int] = []
    sampler = system_metrics.Sampler(lambda values, number: seen.append(number))
    sampler.stop()
    assert seen == [0]
    import psutil

    values = system_metrics.sample(psutil.Process())
    assert values["system/process_memory_usage_megabytes"] > 10
    assert set(system_metrics.sample_gpus([])) == set()
