"""The trellis: the reader's states are the search's, and the search finds the best path."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from windquant.quantizers import actions, viterbi
from windquant.quantizers.base import Fit
from windquant.quantizers.trellis import DISTORTION, SEAM, Trellis, states, table, tile_rows
from windquant.quantizers.viterbi import quantize
from windquant.storage import Pattern, pack

WINDOW = 8
TRELLISES = [name for name in actions() if name.startswith("trellis")]


def entry(name: str) -> Trellis:
    found = actions(WINDOW)[name]
    assert isinstance(found, Trellis)
    return found


@pytest.mark.parametrize("name", TRELLISES)
@pytest.mark.parametrize("rows", [1, 7, 75, 512, 530, 1100])
def test_decoding_gives_what_the_search_decided(name: str, rows: int) -> None:
    found = entry(name)
    generator = torch.Generator().manual_seed(rows)
    columns = torch.randn(3, rows, generator=generator)
    fit = Fit(torch.rand(rows, generator=generator) + 0.5)
    coded = found.encode(columns, fit, torch.rand(rows, generator=generator) + 0.1, torch.eye(3))
    assert torch.equal(found.decode(coded.codes, fit), coded.decoded)
    unscaled = found.unscaled(pack(coded.codes, found.pattern), rows)
    assert torch.equal(unscaled.T * fit.scale, coded.decoded)


@pytest.mark.parametrize("pattern", [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize("window", [4, 8, 14])
@pytest.mark.parametrize("tile", [2, 14, 64])
@pytest.mark.parametrize("rows", [40, 41])
def test_states_are_the_last_bits_of_their_ring(rows: int, tile: int, window: int, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(window * tile)
    codes = torch.randint(0, 16, (2, rows), generator=generator, dtype=torch.uint8)
    codes[:, ::2] %= 1 << pattern[0]
    codes[:, 1::2] %= 1 << pattern[1]
    found = states(pack(codes, pattern), rows, pattern, window, tile)
    for column, start in itertools.product(range(2), range(0, rows, tile)):
        places = range(start, min(start + tile, rows))
        widths = [pattern[row & 1] for row in places]
        state = 0
        ring = len(places) % 2 == 0 and sum(widths) >= window
        for turn in range(1 + ring):  # the first turn of a ring ends with the state before its beginning
            for row, bits in zip(places, widths, strict=True):
                state = state >> bits | int(codes[column, row]) << window - bits
                assert turn < ring or int(found[row, column]) == state


@pytest.mark.parametrize(
    ("pattern", "rows"), [((1, 2), 6), ((2, 2), 6), ((2, 3), 6), ((1, 2), 7), ((2, 2), 5), ((2, 3), 5), ((3, 4), 3)]
)
def test_the_search_is_optimal(pattern: Pattern, rows: int) -> None:
    """Against all code sequences of one short column. Of a ring, the state at its seam is guessed, mostly right."""
    window = max(4, sum(pattern))
    values = table(window).numpy()
    widths = [pattern[row & 1] for row in range(rows)]
    sequences = np.array(list(itertools.product(*(range(1 << width) for width in widths))), np.uint8)
    paths = values[states(pack(torch.from_numpy(sequences), pattern), rows, pattern, window, rows).T.numpy()]
    generator = np.random.default_rng(0)
    found, best = [], []
    for _ in range(20):
        column = generator.normal(size=(1, rows)).astype(np.float32)
        scales = generator.uniform(0.5, 2, rows).astype(np.float32)
        weights = generator.uniform(0.1, 2, rows).astype(np.float32)
        costs = (weights * (column / scales - paths) ** 2).sum(1)
        codes, decoded, errors = quantize(
            column.copy(), scales, weights, np.eye(1, dtype=np.float32), values, pattern, rows, SEAM, 1
        )
        found.append((weights * (column / scales - decoded / scales) ** 2).sum())
        best.append(costs.min())
        assert found[-1] == pytest.approx(costs[(sequences == codes[0]).all(1)].item(), rel=1e-5)
        np.testing.assert_allclose(errors, column - decoded, rtol=1e-5, atol=1e-6)
    assert sum(found) == pytest.approx(sum(best), rel=0.05 if rows % 2 == 0 else 1e-5)


@pytest.mark.parametrize("name", ["trellis-1", "trellis-2", "trellis-3.5"])
def test_rows_next_to_the_seam_err_no_more_than_others(name: str) -> None:
    found = entry(name)
    columns = torch.randn(1000, 128, generator=torch.Generator().manual_seed(5))
    coded = found.encode(columns.clone(), Fit(torch.ones(128)), torch.ones(128), torch.eye(1000))
    error = (coded.decoded - columns).square().mean(0)
    assert error[:4].mean() < 1.1 * error.mean()
    assert error[-4:].mean() < 1.1 * error.mean()


@pytest.mark.parametrize("name", TRELLISES)
def test_the_bank_knows_the_distortion(name: str) -> None:
    found = entry(name)
    columns = torch.randn(24, 512, generator=torch.Generator().manual_seed(3))
    fit = Fit(
        found.fit(torch.randn(1, 10**5, generator=torch.Generator().manual_seed(4)), torch.ones(10**5)).scale.expand(
            512
        )
    )
    coded = found.encode(columns.clone(), fit, torch.ones(512), torch.eye(24))
    error = float((coded.decoded - columns).square().mean())
    assert error == pytest.approx(DISTORTION[found.bits, WINDOW], rel=0.1)


def test_the_table_has_unit_variance() -> None:
    for window in (4, 8, 12, 14):
        values = table(window)
        assert float(values.double().square().mean()) == pytest.approx(1, abs=1e-6)
        assert float(values.double().mean()) == pytest.approx(0, abs=1e-6)
        assert len(values.unique()) == 1 << window


def test_tiles_are_even_and_equal() -> None:
    for rows in range(1, 1200):
        tile = tile_rows(rows, 512)
        assert tile % 2 == 0
        assert tile <= 512
        assert -(-rows // tile) == -(-rows // 512), "no more streams than needed"


def test_rows_that_weigh_more_err_less() -> None:
    columns = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    importance = torch.ones(64)
    importance[::4] = 50
    found = entry("trellis-1")
    coded = found.encode(columns.clone(), Fit(torch.ones(64)), importance, torch.eye(8))
    error = (coded.decoded - columns).square().mean(0)
    assert error[::4].mean() < 0.6 * error[1::4].mean()


VARIANTS = """
import sys, torch
from windquant.quantizers import Fit, actions
for name in sys.argv[1:]:
    actions(8)[name].encode(torch.ones(4, 8), Fit(torch.ones(8)), torch.ones(8), torch.eye(4))
"""


def test_compiled_variants_of_several_processes_work_together(tmp_path: Path) -> None:
    """Two variants that were compiled in two processes once shared a name in numba's cache, and crashed in a third."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for names in (["2"], ["1"], ["1", "2"]):
        command = [sys.executable, "-c", VARIANTS, *(f"trellis-{name}" for name in names)]
        subprocess.run(command, check=True, env=environment)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_rows_that_seem_to_count_for_nothing_are_no_noise(share: float) -> None:
    """They are nearer to their weights than zeros would be; a calibration text may only not have reached them."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(32, 512, generator=generator)
    dead = torch.rand(512, generator=generator) < share
    coded = entry("trellis-2").encode(columns.clone(), Fit(torch.ones(512)), (~dead).float(), torch.eye(32))
    errors = (coded.decoded - columns).square().mean(0)
    assert errors[dead].mean() < 0.7
    assert share == 1 or errors[~dead].mean() < 1.1 * DISTORTION[2.0, WINDOW]


def test_the_search_takes_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of the machine's: a job may have less of it. What it finds is the same."""
    asked: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            asked.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(viterbi, "ThreadPoolExecutor", Pool)
    before = torch.get_num_threads()
    chunk, action = torch.randn(1600, 4), actions(8)["trellis-2"]
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            fit = action.fit(chunk, torch.ones(4))
            found.append(action.encode(chunk.T.contiguous(), fit, torch.ones(1600), torch.eye(4)).codes)
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 3]
    assert torch.equal(*found)
