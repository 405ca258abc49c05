"""The kernels, in the part of the Triton language that CUDA and Ascend (triton-ascend) share.

Each is a 1-D grid of programs that walk over rows, whatever the number of either. A block of columns needs at most
LIVE_VALUES four-byte values per column at a time, which is what its size is chosen by (see triton_rows.block_columns).
Comparisons with `where` instead of minimum and maximum let a NaN through.
"""

# Kernel arguments have no types: Triton compiles them by value.
# ruff: noqa: ANN001, ANN201, ANN202, N803

import triton
import triton.language as tl

LIVE_VALUES = 6
LOWEST = tl.constexpr(-1e30)  # shard.LOWEST
LARGEST_LOG_RATIO = tl.constexpr(80.0)  # policy.LARGEST_LOG_RATIO
NO_KL, KL_K1, KL_K2, KL_K3, KL_LOW_VAR = (tl.constexpr(i) for i in range(5))


@triton.jit
def _row_statistics(row_ptr, columns, inverse_temperature, BLOCK: tl.constexpr):
    """peak, sum of exp(z - peak), sum of exp(z - peak) (z - peak) over one row, in one pass."""
    peak = LOWEST
    sum_exp = 0.0
    weighted = 0.0
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + offsets, mask=offsets < columns, other=-float("inf")).to(tl.float32) * inverse_temperature
        block_peak = tl.max(z, axis=0)
        new_peak = tl.where(block_peak > peak, block_peak, peak)
        shift = peak - new_peak
        shifted = z - new_peak
        shifted = tl.where(shifted < LOWEST, LOWEST, shifted)
        exponentials = tl.exp(shifted)
        factor = tl.exp(shift)
        weighted = factor * (weighted + shift * sum_exp) + tl.sum(exponentials * shifted, axis=0)
        sum_exp = factor * sum_exp + tl.sum(exponentials, axis=0)
        peak = new_peak
    return peak, sum_exp, weighted


@triton.jit
def _write_row_gradient(
    row_ptr, out_ptr, columns, width, target, peak, log_sum, entropy, derivative, bonus, inverse_temperature,
    BLOCK: tl.constexpr, HAS_BONUS: tl.constexpr, NARROWS: tl.constexpr,
):  # fmt: skip
    """out[j] = (derivative (onehot - p) + bonus p (log p + H)) inverse_temperature; 0 in the columns up to `width`."""
    for first in range(0, width, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + offsets, mask=offsets < columns, other=-float("inf")).to(tl.float32)
        log_p = z * inverse_temperature - peak
        log_p = tl.where(log_p < LOWEST, LOWEST, log_p) - log_sum
        p = tl.exp(log_p)
        gradient = -derivative * p
        if HAS_BONUS:
            gradient += bonus * p * (log_p + entropy)
        gradient += tl.where(offsets == target, derivative, 0.0)
        if NARROWS:
            # The output's row starts where the wider input's row starts: no lane may store before all have loaded.
            tl.debug_barrier()
        tl.store(out_ptr + offsets, (gradient * inverse_temperature).to(out_ptr.dtype.element_ty), mask=offsets < width)


@triton.jit
def _write_zeros(out_ptr, width, BLOCK: tl.constexpr):
    for first in range(0, width, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=offsets < width)


@triton.jit
def _kl_derivative(difference, KL: tl.constexpr):
    """policy.kl_derivative."""
    if KL == KL_K1:
        return difference * 0.0 + 1.0
    if KL == KL_K2:
        return difference
    # 1 - exp(-d) loses its digits where d is small
    series = difference * (1.0 - difference * (0.5 - difference * (1.0 / 6.0 - difference / 24.0)))
    slope = tl.where(tl.abs(difference) < 0.05, series, 1.0 - tl.exp(-difference))
    if KL == KL_LOW_VAR:
        value = tl.exp(-difference) - 1.0 + difference
        slope = tl.where((tl.abs(difference) <= 20.0) & (value <= 10.0), slope, 0.0)
    return slope


@triton.jit
def _loss_derivative(
    logprob, advantage, old, ref, weight, lower_negative, upper_positive, upper_negative, kl_coeff,
    HAS_OLD: tl.constexpr, KL: tl.constexpr, CISPO: tl.constexpr,
):  # fmt: skip
    """policy.token_loss_derivative. CISPO's bounds are lower_negative and upper_positive for either sign."""
    ratio = logprob * 0.0 + 1.0
    if HAS_OLD:
        log_ratio = logprob - old
        ratio = tl.exp(tl.where(log_ratio > LARGEST_LOG_RATIO, LARGEST_LOG_RATIO, log_ratio))
    if CISPO:
        ratio = tl.where(ratio < lower_negative, lower_negative, ratio)
        derivative = -advantage * tl.where(ratio > upper_positive, upper_positive, ratio)
    else:
        lower = tl.where(advantage < 0, lower_negative, 0.0)
        upper = tl.where(advantage < 0, upper_negative, upper_positive)
        derivative = tl.where((ratio >= lower) & (ratio <= upper), -advantage * ratio, 0.0)
    if KL != NO_KL:
        derivative += kl_coeff * _kl_derivative(logprob - ref, KL)
    return tl.where(logprob != logprob, logprob, derivative * weight)


@triton.jit
def row_statistics(
    logits_ptr, stride, columns_ptr, statistics_ptr, rows, columns, inverse_temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """statistics [5, rows] float32: peak, sum_exp, weighted, target, held of logits [rows, columns]."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * stride
        peak, sum_exp, weighted = _row_statistics(row_ptr, columns, inverse_temperature, BLOCK)
        column = tl.load(columns_ptr + row)
        held = column >= 0
        target = tl.load(row_ptr + tl.where(held, column, 0)).to(tl.float32) * inverse_temperature - peak
        tl.store(statistics_ptr + row, peak)
        tl.store(statistics_ptr + rows + row, sum_exp)
        tl.store(statistics_ptr + 2 * rows + row, weighted)
        tl.store(statistics_ptr + 3 * rows + row, tl.where(held, target, 0.0))
        tl.store(statistics_ptr + 4 * rows + row, tl.where(held, 1.0, 0.0))


@triton.jit
def token_terms(
    statistics_ptr, advantages_ptr, old_ptr, ref_ptr, weights_ptr, out_ptr, rows,
    lower_negative, upper_positive, upper_negative, kl_coeff,
    HAS_OLD: tl.constexpr, HAS_WEIGHTS: tl.constexpr, KL: tl.constexpr, CISPO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [3, rows]: logprob, entropy and d loss / d logprob, from statistics [5, rows] over the whole vocabulary."""
    for first in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < rows
        sum_exp = tl.load(statistics_ptr + rows + row, mask=inside, other=1.0)
        weighted = tl.load(statistics_ptr + 2 * rows + row, mask=inside, other=0.0)
        target = tl.load(statistics_ptr + 3 * rows + row, mask=inside, other=0.0)
        held = tl.load(statistics_ptr + 4 * rows + row, mask=inside, other=1.0)
        log_sum = tl.log(sum_exp)
        logprob = tl.where(held > 0, target - log_sum, float("nan"))
        advantage = tl.load(advantages_ptr + row, mask=inside, other=0.0)
        old = tl.load(old_ptr + row, mask=inside & HAS_OLD, other=0.0)
        weight = tl.load(weights_ptr + row, mask=inside & HAS_WEIGHTS, other=1.0)
        ref = tl.load(ref_ptr + row, mask=inside & (KL != NO_KL), other=0.0)
        derivative = _loss_derivative(
            logprob, advantage, old, ref, weight, lower_negative, upper_positive, upper_negative, kl_coeff,
            HAS_OLD, KL, CISPO,
        )  # fmt: skip
        tl.store(out_ptr + row, logprob, mask=inside)
        tl.store(out_ptr + rows + row, log_sum - weighted / sum_exp, mask=inside)
        tl.store(out_ptr + 2 * rows + row, derivative, mask=inside)


@triton.jit
def row_gradient(
    logits_ptr, stride, out_ptr, out_stride, sources_ptr, columns_ptr, peak_ptr, sum_exp_ptr, entropy_ptr,
    derivative_ptr, bonus_ptr, count, columns, inverse_temperature,
    BLOCK: tl.constexpr, HAS_BONUS: tl.constexpr, NARROWS: tl.constexpr,
):  # fmt: skip
    """Row i of out [count, columns] is the gradient of row sources[i] of the logits; both may share their memory."""
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        source = tl.load(sources_ptr + row)
        _write_row_gradient(
            logits_ptr + tl.cast(source, tl.int64) * stride,
            out_ptr + tl.cast(row, tl.int64) * out_stride,
            columns,
            columns,
            tl.load(columns_ptr + source),
            tl.load(peak_ptr + source),
            tl.log(tl.load(sum_exp_ptr + source)),
            tl.load(entropy_ptr + source),
            tl.load(derivative_ptr + source),
            tl.load(bonus_ptr + source, mask=HAS_BONUS, other=0.0),
            inverse_temperature,
            BLOCK,
            HAS_BONUS,
            NARROWS,
        )


@triton.jit
def loss_from_logits(
    logits_ptr, stride, out_ptr, out_stride, mask_ptr, columns_ptr, advantages_ptr, old_ptr, ref_ptr, weights_ptr,
    scale_ptr, logprobs_ptr, entropy_ptr, rows, columns, width,
    lower_negative, upper_positive, upper_negative, kl_coeff, bonus, inverse_temperature,
    HAS_OLD: tl.constexpr, HAS_WEIGHTS: tl.constexpr, KL: tl.constexpr, CISPO: tl.constexpr,
    HAS_BONUS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything about each row of logits [rows, columns], with its gradient times *scale in out [rows, width].

    logprobs and entropy [rows] must be 0 beforehand: masked rows are not read. The second pass over a row follows the
    first at once, so that as much of the row as the cache holds is read from there.
    """
    scale = tl.load(scale_ptr)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * stride
        out_row_ptr = out_ptr + tl.cast(row, tl.int64) * out_stride
        column = tl.load(columns_ptr + row).to(tl.int32)
        unmasked = tl.load(mask_ptr + row) != 0
        peak, sum_exp, weighted, derivative, weight = 0.0, 1.0, 0.0, 0.0, 1.0
        if unmasked:
            peak, sum_exp, weighted = _row_statistics(row_ptr, columns, inverse_temperature, BLOCK)
            held = column >= 0
            z = tl.load(row_ptr + tl.where(held, column, 0)).to(tl.float32) * inverse_temperature
            logprob = tl.where(held, z - peak - tl.log(sum_exp), float("nan"))
            tl.store(logprobs_ptr + row, logprob)
            tl.store(entropy_ptr + row, tl.log(sum_exp) - weighted / sum_exp)
            weight = tl.load(weights_ptr + row, mask=HAS_WEIGHTS, other=1.0)
            derivative = _loss_derivative(
                logprob,
                tl.load(advantages_ptr + row),
                tl.load(old_ptr + row, mask=HAS_OLD, other=0.0),
                tl.load(ref_ptr + row, mask=KL != NO_KL, other=0.0),
                weight,
                lower_negative, upper_positive, upper_negative, kl_coeff, HAS_OLD, KL, CISPO,
            )  # fmt: skip
        if WRITES:
            if unmasked & (HAS_BONUS | (derivative != 0)):
                log_sum = tl.log(sum_exp)
                _write_row_gradient(
                    row_ptr, out_row_ptr, columns, width, column, peak, log_sum, log_sum - weighted / sum_exp,
                    derivative * scale, bonus * weight * scale, inverse_temperature, BLOCK, HAS_BONUS,
                    tl.constexpr(False),
                )  # fmt: skip
            else:
                _write_zeros(out_row_ptr, width, BLOCK)


@triton.jit
def scale_in_place(values_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """values *= *factor, without touching them where the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        step = tl.num_programs(0) * BLOCK
        for first in range(tl.program_id(0) * BLOCK, count, step):
            offsets = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + offsets, mask=offsets < count).to(tl.float32) * factor
            tl.store(values_ptr + offsets, values.to(values_ptr.dtype.element_ty), mask=offsets < count)
