"""Quantize one linear, chunk after chunk, each on weights that make up for the errors before it.

GPTQ (arXiv 2210.17323) with a bit-width per chunk: with H = E[x x^T] plus a tenth of the median of its diagonal and U
the upper Cholesky factor of H^-1 (H^-1 = U^T U), the error of column i is spread over the columns behind it:

    e_i = (w_i - q_i) / U_ii,    W[:, i+1:] -= e_i U[i, i+1:]

Scales are fitted on the already compensated weights. Chunks that their treatment wants rotated are quantized as
W R with R^T H R (see quantizers/rotation.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from windquant import compute, kernels
from windquant.packed import Layout, chunk_order, pack_order
from windquant.quantizers import Fit, actions
from windquant.quantizers.rotation import rotation
from windquant.scales import SCALE_BITS, ScaleCoder, decode_offset, encode_offset
from windquant.units import chunk_widths

DAMPING = 0.1  # of the median energy: one channel can have a million times the others', and drown them in a mean
BLOCK = 256  # columns that one thread factorizes and inverts


def column_order(energy: Tensor, order: str, chunk: int, protected: int) -> Tensor:
    """Permutation int64 [columns]: by energy (`saliency`, descending) or `natural`; protected columns first.

    Inside a chunk the columns keep their natural order, which is how the order is stored.
    """
    by_energy = torch.argsort(energy, descending=True, stable=True)
    if order == "natural":
        rest = by_energy[protected:].sort().values
        by_energy = torch.cat([by_energy[:protected], rest])
    return chunk_order(by_energy, chunk_widths(len(energy), protected, chunk), protected)


def damping(energy: Tensor) -> float:
    """What is added to every channel's energy E[x_j^2], given as [columns]; dead inputs do not count, 1 if all are."""
    alive = energy[energy > 0]
    return DAMPING * alive.median().item() if len(alive) else 1.0


def factor(covariance: Tensor, damping: float) -> Tensor:
    """Upper triangular U [n, n], float32, with (H + damping I)^-1 = U^T U; computed in float64.

    With J the reversal of the order, J H J = L L^T gives U = J L^-1 J: no inverse of H itself is needed. Dead inputs
    (zero rows of H) are kept apart from the others by the damping. Where H is not positive definite with it (H was
    summed in FP32, where a channel with 10^8 times the others' energy leaves errors of their size), ten times as much
    is added, and so on.
    """
    while True:
        matrix = covariance.double().flip(0, 1)
        matrix.diagonal().add_(damping)
        try:
            return inverse_cholesky(matrix).flip(0, 1).float()
        except torch.linalg.LinAlgError:
            if not covariance.isfinite().all():
                raise
            damping *= 10


def inverse_cholesky(matrix: Tensor) -> Tensor:
    """Lower triangular L^-1 [n, n] with L L^T the matrix, which is overwritten; on a CPU the same bits with any number
    of threads.

    LAPACK's own factorization and triangular solutions sum otherwise with every number of them, and a last bit that
    flips, flips codes. So diagonal blocks take one thread; all the rest are products, which take all.
    """
    inverse = torch.zeros_like(matrix)
    for start in range(0, len(matrix), BLOCK):
        end = start + BLOCK
        block, below = matrix[start:end, start:end], matrix[end:, start:end]
        with compute.threads(1):
            lower = torch.linalg.cholesky(block)
            identity = torch.eye(len(block), dtype=block.dtype, device=block.device)
            own = torch.linalg.solve_triangular(lower, identity, upper=False)
        below.copy_(below @ own.T)
        matrix[end:, end:] -= below @ below.T
        # by L L^-1 = I, row of blocks by row of blocks
        inverse[start:end, start:end] = own
        inverse[start:end, :start] = -own @ (matrix[start:end, :start] @ inverse[:start, :start])
    return inverse


def rotate(covariance: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """R^T H R for rotations of the column blocks (start, width); the columns between them stay as they are."""
    result = covariance.clone()
    for start, width in blocks:
        result[:, start : start + width] = result[:, start : start + width] @ rotation(width).to(result.device)
    for start, width in blocks:
        result[start : start + width] = rotation(width).T.to(result.device) @ result[start : start + width]
    return result


def quantize_linear(
    weight: Tensor, order: Tensor, covariance: Tensor, layout: Layout, importance: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one linear as they are stored (names of `Layout.shapes`), and the weight that they stand for.

    weight: float32 [rows, columns]; order: int64 [columns], protected columns first; covariance: H [columns, columns]
    in natural order; importance: [rows], weight of each row's squared error (Fisher). The work is done where the weight
    is, by what `kernels` chooses for that device; the stored tensors are on the CPU.
    """
    device = weight.device
    stored_order, order = order.cpu(), order.to(device)
    covariance, importance = covariance.to(device), importance.to(device)
    protected, starts, widths = layout.protected, layout.starts, layout.widths
    rotated = [
        (protected + start, width)
        for start, width, entry in zip(starts, widths, layout.actions, strict=True)
        if entry.rotated
    ]
    energy = covariance.diagonal()[order]
    factor_u = factor(rotate(covariance[order][:, order], rotated), damping(energy))
    work = weight[:, order].T.contiguous()  # [columns, rows]: a column is contiguous
    for start, width in rotated:
        work[start : start + width] = rotation(width).T.to(device) @ work[start : start + width]

    ids = {name: index for index, name in enumerate(actions())}
    tensors: dict[str, Tensor] = {"actions": torch.tensor([ids[name] for name in layout.names], dtype=torch.uint8)}
    decoded = torch.empty_like(work)
    if protected:
        tensors["protected"], tensors["protected_scales"], decoded[:protected] = _protect(work, protected, factor_u)
    fits = [
        kernels.fit(entry, work[protected + start :][:width], energy[protected + start :][:width]).scale
        for start, width, entry in zip(starts, widths, layout.actions, strict=True)
        if entry.has_scale
    ]
    coder = ScaleCoder.fit(torch.stack(fits or [torch.ones(layout.linear.rows, device=device)], 1))
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    offsets: list[Tensor] = []
    chunk_scales = torch.zeros(len(widths), dtype=torch.float16, device=device)
    for chunk, (start, width, entry) in enumerate(zip(starts, widths, layout.actions, strict=True)):
        first, last = protected + start, protected + start + width
        fit = kernels.fit(entry, work[first:last], energy[first:last])
        scale, offset = fit.scale, fit.offset
        if entry.has_scale:
            scale_codes, chunk_scales[chunk] = coder.encode(scale, least=entry.covers)
            scale = coder.decode(scale_codes, chunk_scales[chunk])
            scales.append(kernels.pack(scale_codes[None], (SCALE_BITS, SCALE_BITS)))
        if offset is not None:
            levels = round(2**entry.bits)
            packed = encode_offset(offset, levels)
            offset = decode_offset(packed, levels)
            offsets.append(packed[None])
        block = factor_u[first:last, first:last].contiguous()
        coded = kernels.encode(entry, work[first:last], Fit(scale, offset), importance, block)
        work[last:] -= factor_u[first:last, last:].T @ coded.errors
        decoded[first:last] = rotation(width).to(device) @ coded.decoded if entry.rotated else coded.decoded
        codes.append(kernels.pack(coded.codes, entry.pattern))

    ordered = layout.storage_order
    with_scale = [chunk for chunk, entry in enumerate(layout.actions) if entry.has_scale]
    with_offset = [chunk for chunk, entry in enumerate(layout.actions) if entry.has_offset]
    tensors["codes"] = torch.cat(
        [codes[chunk].flatten() for chunk in ordered]
        or [torch.empty(layout.shapes["codes"][0], dtype=torch.uint8)]  # all columns are protected
    )
    by_chunk = dict(zip(with_scale, scales, strict=True))
    tensors["scales"] = torch.cat(
        [by_chunk[chunk] for chunk in ordered if chunk in by_chunk]
        or [torch.empty(layout.shapes["scales"][0], dtype=torch.uint8)]
    )
    if with_offset:
        by_chunk = dict(zip(with_offset, offsets, strict=True))
        tensors["offsets"] = torch.cat([by_chunk[chunk] for chunk in ordered if chunk in by_chunk])
    tensors["scale_grid"] = torch.stack([coder.base, coder.step])
    tensors["row_scales"] = coder.rows
    tensors["chunk_scales"] = chunk_scales
    if layout.owner:
        tensors["order"] = pack_order(stored_order, widths, protected)
    result = torch.empty_like(weight)
    result[:, order] = decoded.T
    return {name: tensor.cpu() for name, tensor in tensors.items()}, result


def _protect(work: Tensor, count: int, factor_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 codes [count, rows], FP16 scales [count] and decoded weights of the first columns; corrects the rest."""
    codes = work.new_empty(count, work.shape[1], dtype=torch.int8)
    scales = work.new_empty(count, dtype=torch.float16)
    decoded = work.new_empty(count, work.shape[1])
    for i in range(count):
        scales[i] = (work[i].abs().max() / 127).clamp_min(2.0**-24)
        codes[i] = (work[i] / scales[i].float()).round().clamp(-127, 127).to(torch.int8)
        decoded[i] = codes[i].float() * scales[i].float()
        error = (work[i] - decoded[i]) / factor_u[i, i]
        work[i + 1 :] -= factor_u[i, i + 1 :, None] * error
    return codes, scales, decoded
