"""The trellis: the reader's states are the search's, and the search finds the best path."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from windquant.quantizers import actions
from windquant.quantizers.base import Fit
from windquant.quantizers.trellis import DISTORTION, Trellis, packed_states, states, table, tile_rows
from windquant.quantizers.viterbi import compiled, use_threads
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
    tile = tile_rows(rows, found.tile)
    reference = states(coded.codes, found.pattern, WINDOW, tile)
    packed = pack(coded.codes, found.pattern)
    assert torch.equal(packed_states(packed, rows, found.pattern, WINDOW, tile), reference.T)
    assert torch.equal(found.unscaled(packed, rows), table(WINDOW)[reference].T)


@pytest.mark.parametrize("pattern", [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize("window", [4, 8, 10, 12, 14])
@pytest.mark.parametrize("tile", [2, 8, 14, 64])
def test_states_are_the_last_bits_of_their_tile(pattern: Pattern, window: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(window * tile)
    codes = torch.randint(0, 16, (2, 41), generator=generator, dtype=torch.uint8)
    codes[:, ::2] %= 1 << pattern[0]
    codes[:, 1::2] %= 1 << pattern[1]
    found = states(codes, pattern, window, tile)
    assert torch.equal(packed_states(pack(codes, pattern), 41, pattern, window, tile), found.T)
    for column in range(2):
        for row in range(41):
            if row % tile == 0:
                state = 0  # no start state is stored
            bits = pattern[row & 1]
            state = state >> bits | int(codes[column, row]) << window - bits
            assert int(found[column, row]) == state


@pytest.mark.parametrize(("pattern", "rows"), [((1, 2), 6), ((2, 2), 6), ((2, 3), 6), ((3, 4), 4)])
def test_the_search_is_optimal(pattern: Pattern, rows: int) -> None:
    """Against all code sequences of one short column."""
    window = max(4, sum(pattern))
    values = table(window).numpy()
    widths = [pattern[row & 1] for row in range(rows)]
    sequences = np.array(list(itertools.product(*(range(1 << width) for width in widths))), np.uint8)
    paths = values[states(torch.from_numpy(sequences), pattern, window, rows).numpy()]
    generator = np.random.default_rng(0)
    for _ in range(20):
        column = generator.normal(size=(1, rows)).astype(np.float32)
        scales = generator.uniform(0.5, 2, rows).astype(np.float32)
        weights = generator.uniform(0.1, 2, rows).astype(np.float32)
        costs = (weights * (column / scales - paths) ** 2).sum(1)
        codes, decoded, errors = compiled(*pattern, window)(
            column.copy(), scales, weights, np.eye(1, dtype=np.float32), values, rows
        )
        cost = (weights * (column / scales - decoded / scales) ** 2).sum()
        assert cost == pytest.approx(costs.min(), rel=1e-5)
        assert codes[0].tolist() == sequences[costs.argmin()].tolist()
        np.testing.assert_allclose(errors, column - decoded, rtol=1e-5, atol=1e-6)


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
    for names in (["2"], ["1", "1.5"], ["1", "1.5", "2", "3"], ["2", "3"]):
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


def test_the_search_takes_as_many_threads_as_torch() -> None:
    """Not all that numba sees: a job may have less of the machine."""
    before, most = torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS
    chunk, action = torch.randn(32, 8), actions(8)["trellis-2"]
    try:
        for count in (most, 1, 10_000):
            use_threads(count % 2 + 1)  # another number
            torch.set_num_threads(count)
            action.encode(chunk.T.contiguous(), action.fit(chunk, torch.ones(8)), torch.ones(32), torch.eye(8))
            assert numba.get_num_threads() == min(count, most)
    finally:
        torch.set_num_threads(before)
