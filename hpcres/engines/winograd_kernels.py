"""The compiled kernels of a layer in Winograd's form, and of the labels."""

from __future__ import annotations

import numpy as np

from hpcres.compiled import compiled
from hpcres.engines.winograd_axes import A3, A4, TAP_COUNTS
from hpcres.simd.products import combination, fixed_combination, panel
from hpcres.simd.registers import add, floats, fma, load, load_splat, multiply, rectified, store, total, zero

_combine_4, _combine_6, _combine_7 = (combination(taps, 6) for taps in TAP_COUNTS)
_one_of_4, _one_of_6, _one_of_7 = (combination(taps, 1) for taps in TAP_COUNTS)
_panel_5_4, _panel_10_2, _panel_12_1, _panel_2_1 = panel(5, 4), panel(10, 2), panel(12, 1), panel(2, 1)
_four_of_3 = fixed_combination(A3, ((1, 2), (3, 4)))
_four_of_4 = fixed_combination(A4)


@compiled
def _combine(taps, target, t, step, source, s, offsets, o, table, k, lanes):
    if taps == 4:
        _combine_4(target, t, step, source, s, offsets, o, table, k, lanes)
    elif taps == 6:
        _combine_6(target, t, step, source, s, offsets, o, table, k, lanes)
    else:
        _combine_7(target, t, step, source, s, offsets, o, table, k, lanes)


@compiled
def _combine_to_one(taps, target, t, source, s, offsets, o, table, k, lanes):
    if taps == 4:
        _one_of_4(target, t, 0, source, s, offsets, o, table, k, lanes)
    elif taps == 6:
        _one_of_6(target, t, 0, source, s, offsets, o, table, k, lanes)
    else:
        _one_of_7(target, t, 0, source, s, offsets, o, table, k, lanes)


@compiled
def _take_in(g, x, channels, taps, zo, zt, tz, yo, yt, ty, xo, xt, first, last, values, t0, rows, strip, pile, lanes):
    """Transform the inputs of cells first … last of a row for product g along z, into `values`.

    `values` is (6, 6, rows, channels) and is filled from row t0 on.
    """
    width = floats(lanes)
    piled = np.empty(taps, np.int64)
    for j in range(taps):
        piled[j] = j * width
    begin, end = xo[first * taps] // (6 * channels), xo[last * taps - 1] // (6 * channels) + 1
    for column in range(begin, end):
        for c in range(0, channels, width):
            at = column * channels + c
            for j in range(taps):
                _combine_to_one(
                    taps, pile, j * width, x, yo[ty * taps + j] + at, zo, tz * taps, zt, (tz * 6 + g) * taps, lanes
                )
            _combine(taps, strip, 6 * column * channels + c, channels, pile, 0, piled, 0, yt, ty * 6 * taps, lanes)
    for cell in range(first, last):
        at = (t0 + cell - first) * channels
        if taps == 4:
            _along_x(values, at, rows * channels, strip, xo, xt, cell, channels, lanes)
            continue
        for i in range(6):
            for c in range(0, channels, width):
                _combine(
                    taps,
                    values,
                    6 * i * rows * channels + at + c,
                    rows * channels,
                    strip,
                    i * channels + c,
                    xo,
                    cell * taps,
                    xt,
                    cell * 6 * taps,
                    lanes,
                )


@compiled
def _along_x(values, at, step, strip, xo, xt, cell, channels, lanes):
    """Do the last of the three transforms for four taps, which takes most of the time: its table stays in registers."""
    width, k = floats(lanes), 24 * cell
    s0, s1, s2, s3 = xo[4 * cell], xo[4 * cell + 1], xo[4 * cell + 2], xo[4 * cell + 3]
    a0, a1, a2, a3 = _four(xt, k, lanes)
    b0, b1, b2, b3 = _four(xt, k + 4, lanes)
    c0, c1, c2, c3 = _four(xt, k + 8, lanes)
    d0, d1, d2, d3 = _four(xt, k + 12, lanes)
    e0, e1, e2, e3 = _four(xt, k + 16, lanes)
    f0, f1, f2, f3 = _four(xt, k + 20, lanes)
    for i in range(0, 6 * channels, channels):
        for c in range(i, i + channels, width):
            p, q = load(strip, s0 + c, lanes), load(strip, s1 + c, lanes)
            r, s = load(strip, s2 + c, lanes), load(strip, s3 + c, lanes)
            t = at + c - i
            store(values, t, fma(a3, s, fma(a2, r, fma(a1, q, multiply(a0, p)))))
            store(values, t + step, fma(b3, s, fma(b2, r, fma(b1, q, multiply(b0, p)))))
            store(values, t + 2 * step, fma(c3, s, fma(c2, r, fma(c1, q, multiply(c0, p)))))
            store(values, t + 3 * step, fma(d3, s, fma(d2, r, fma(d1, q, multiply(d0, p)))))
            store(values, t + 4 * step, fma(e3, s, fma(e2, r, fma(e1, q, multiply(e0, p)))))
            store(values, t + 5 * step, fma(f3, s, fma(f2, r, fma(f1, q, multiply(f0, p)))))
        at += 6 * step


@compiled
def _four(table, k, lanes):
    return (
        load_splat(table, k, lanes),
        load_splat(table, k + 1, lanes),
        load_splat(table, k + 2, lanes),
        load_splat(table, k + 3, lanes),
    )


@compiled
def _multiply(g, values, weights, products, rows, used, inputs, outputs, lanes):
    """Compute products (6, 6, rows, outputs) = values (6, 6, rows, inputs) · weights (6, 6, 6, inputs, outputs)[g].

    Only the first `used` rows are computed.
    """
    width = floats(lanes)
    for f in range(36):
        v, w, m = f * rows * inputs, (36 * g + f) * inputs * outputs, f * rows * outputs
        together = 5 if outputs % (4 * width) == 0 else 10 if outputs % (2 * width) == 0 else 12
        whole = used // together * together
        if together == 5:
            for k in range(0, outputs, 4 * width):
                for t in range(0, whole, 5):
                    _panel_5_4(
                        values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                    )
        elif together == 10:
            for k in range(0, outputs, 2 * width):
                for t in range(0, whole, 10):
                    _panel_10_2(
                        values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                    )
        else:
            for k in range(0, outputs, width):
                for t in range(0, whole, 12):
                    _panel_12_1(
                        values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                    )
        for k in range(0, outputs, width):
            for t in range(whole, used, 2):
                _panel_2_1(
                    values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                )


@compiled
def _gather(transposed, g, products, rows, used, channels, planes, scratch, lanes):
    """Transform product g along z to outputs along y and x, into `planes`.

    `planes` is (rows, channels, 6, 4, 4) with a register for each group of channels.
    """
    width, plane = floats(lanes), rows * channels
    for t in range(used):
        for c in range(0, channels, width):
            at, m = 96 * (t * channels + c) + 16 * g * width, t * channels + c
            for y in range(6):
                if transposed:
                    _four_of_4(scratch, 4 * y * width, width, products, m + 6 * y * plane, plane, lanes)
                else:
                    _four_of_3(scratch, 4 * y * width, width, products, m + 6 * y * plane, plane, lanes)
            for x in range(4):
                if transposed:
                    _four_of_4(planes, at + x * width, 4 * width, scratch, x * width, 4 * width, lanes)
                else:
                    _four_of_3(planes, at + x * width, 4 * width, scratch, x * width, 4 * width, lanes)


@compiled
def _give_out(
    transposed,
    planes,
    t0,
    channels,
    begin,
    end,
    bias,
    relu,
    out,
    at,
    z_step,
    y_step,
    depth,
    height,
    length,
    before,
    b_at,
    bz_step,
    by_step,
    after,
    a_at,
    az_step,
    ay_step,
    scratch,
    lanes,
):
    """Write the outputs of cells begin … end of a row, 4³ each as far as depth × height × length reaches.

    They go into `out` from `at` on. `before` is added ahead of the ReLU and `after` behind it, where they are not
    empty.
    """
    width = floats(lanes)
    for cell in range(begin, end):
        for c in range(0, channels, width):
            b, first = load(bias, c, lanes), 96 * ((t0 + cell - begin) * channels + c)
            for yx in range(16):
                if transposed:
                    _four_of_4(scratch, yx * width, 16 * width, planes, first + yx * width, 16 * width, lanes)
                else:
                    _four_of_3(scratch, yx * width, 16 * width, planes, first + yx * width, 16 * width, lanes)
            inside = min(4, length - 4 * cell)
            for z in range(min(4, depth)):
                for y in range(min(4, height)):
                    for x in range(inside):
                        value = add(load(scratch, (16 * z + 4 * y + x) * width, lanes), b)
                        along = (4 * cell + x) * channels + c
                        if before.size:
                            value = add(value, load(before, b_at + z * bz_step + y * by_step + along, lanes))
                        if relu:
                            value = rectified(value)
                        if after.size:
                            value = add(value, load(after, a_at + z * az_step + y * ay_step + along, lanes))
                        store(out, at + z * z_step + y * y_step + along, value)


@compiled
def convolve(
    x,
    inputs,
    taps,
    tables,
    cells,
    transposed,
    weights,
    bias,
    relu,
    outputs,
    out,
    place,
    extent,
    steps,
    before,
    b_place,
    b_steps,
    after,
    a_place,
    a_steps,
    rows,
    values,
    products,
    planes,
    strip,
    pile,
    scratch,
    narrow,
    wide,
):
    """Compute one stage: `cells` (z, y, x) of outputs, some rows of them at a time.

    Of the 6³ products of these rows, 6² are computed at a time. x (…, inputs) is the input and `out` the output.
    `place` is where the first output goes, `extent` how many outputs there are, `steps` the distance of z and y
    neighbours in `out`; likewise for `before` and `after`. `narrow` are the lanes of the inputs, `wide` those of the
    outputs.
    """
    zo, zt, yo, yt, xo, xt = tables
    together = max(1, rows // cells[2])
    parts = -(-cells[2] // rows)
    for tz in range(cells[0]):
        for ty0 in range(0, cells[1], together):
            ty1 = min(ty0 + together, cells[1])
            for part in range(parts):
                tx0, tx1 = part * cells[2] // parts, (part + 1) * cells[2] // parts
                length = tx1 - tx0
                used = (ty1 - ty0) * length
                for g in range(6):
                    for ty in range(ty0, ty1):
                        _take_in(
                            g,
                            x,
                            inputs,
                            taps,
                            zo,
                            zt,
                            tz,
                            yo,
                            yt,
                            ty,
                            xo,
                            xt,
                            tx0,
                            tx1,
                            values,
                            (ty - ty0) * length,
                            rows,
                            strip,
                            pile,
                            narrow,
                        )
                    _multiply(g, values, weights, products, rows, used, inputs, outputs, wide)
                    _gather(transposed, g, products, rows, used, outputs, planes, scratch, wide)
                for ty in range(ty0, ty1):
                    _give_out(
                        transposed,
                        planes,
                        (ty - ty0) * length,
                        outputs,
                        tx0,
                        tx1,
                        bias,
                        relu,
                        out,
                        place + 4 * (tz * steps[0] + ty * steps[1]),
                        steps[0],
                        steps[1],
                        extent[0] - 4 * tz,
                        extent[1] - 4 * ty,
                        extent[2],
                        before,
                        b_place + 4 * (tz * b_steps[0] + ty * b_steps[1]),
                        b_steps[0],
                        b_steps[1],
                        after,
                        a_place + 4 * (tz * a_steps[0] + ty * a_steps[1]),
                        a_steps[0],
                        a_steps[1],
                        scratch,
                        wide,
                    )


@compiled
def label(features, planes, y_step, height, length, channels, weights, bias, phases, labels, logits, lanes):
    """Compute the last convolution and the most likely phase of one plane of `height` × `length` voxels.

    features is (…, y, x, channels). `planes` are where the three planes around the plane start, one voxel before the
    first output in y and x. weights is (phase, dz, dy, dx, channel). Returns whether every logit was finite.
    """
    width = floats(lanes)
    nothing = np.float32(0)  # what infinite or undefined logits turn into NaN
    for y in range(height):
        for x in range(0, length, 8):
            for p in range(phases):
                a, b, c, d = zero(lanes), zero(lanes), zero(lanes), zero(lanes)
                e, f, g, h = zero(lanes), zero(lanes), zero(lanes), zero(lanes)
                w = p * 27 * channels
                for dz in range(3):
                    for dy in range(3):
                        at = planes[dz] + (y + dy) * y_step + x * channels
                        for _ in range(0, channels, width):
                            w0, w1 = load(weights, w, lanes), load(weights, w + channels, lanes)
                            w2 = load(weights, w + 2 * channels, lanes)
                            f0, f1 = load(features, at, lanes), load(features, at + channels, lanes)
                            f2, f3 = load(features, at + 2 * channels, lanes), load(features, at + 3 * channels, lanes)
                            a, b = fma(w2, f2, fma(w1, f1, fma(w0, f0, a))), fma(w2, f3, fma(w1, f2, fma(w0, f1, b)))
                            f4, f5 = load(features, at + 4 * channels, lanes), load(features, at + 5 * channels, lanes)
                            c, d = fma(w2, f4, fma(w1, f3, fma(w0, f2, c))), fma(w2, f5, fma(w1, f4, fma(w0, f3, d)))
                            f6, f7 = load(features, at + 6 * channels, lanes), load(features, at + 7 * channels, lanes)
                            e, f = fma(w2, f6, fma(w1, f5, fma(w0, f4, e))), fma(w2, f7, fma(w1, f6, fma(w0, f5, f)))
                            f8, f9 = load(features, at + 8 * channels, lanes), load(features, at + 9 * channels, lanes)
                            g, h = fma(w2, f8, fma(w1, f7, fma(w0, f6, g))), fma(w2, f9, fma(w1, f8, fma(w0, f7, h)))
                            at += width
                            w += width
                        w += 2 * channels
                q = 8 * p
                logits[q], logits[q + 1], logits[q + 2], logits[q + 3] = total(a), total(b), total(c), total(d)
                logits[q + 4], logits[q + 5], logits[q + 6], logits[q + 7] = total(e), total(f), total(g), total(h)
            for i in range(min(8, length - x)):
                best, label = logits[i] + bias[0], 0
                nothing += best * np.float32(0)
                for p in range(1, phases):
                    value = logits[8 * p + i] + bias[p]
                    nothing += value * np.float32(0)
                    better = value > best
                    best, label = value if better else best, p if better else label
                labels[y, x + i] = label
    return nothing == 0
