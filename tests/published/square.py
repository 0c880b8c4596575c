"""Square as published, what it does to one image [C, H, W] once its random numbers are drawn: l_inf and l2 by
Andriushchenko et al. (2020, arXiv 1912.00049), l1 and the stretched schedule by AutoAttack."""

from __future__ import annotations

import math

import torch

UNTIL = [(10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128), (8000, 256)]


def side(query, queries, p_init, height, width, norm):
    """Of the window of the query with that number, from 0 on."""
    scaled = int(query / queries * 10000)
    p = p_init / next((part for until, part in UNTIL if scaled <= until), 512)
    s = max(int(round(math.sqrt(p * height * width))), 1 if norm == "linf" else 3)
    if norm != "linf" and s % 2 == 0:
        s += 1
    return min(s, height, width)


def length(t, norm):
    return t.square().sum().sqrt() if norm == "l2" else t.abs().sum()


def bump(height, width, norm):
    """Rectangles that grow by one pixel on each side, on top of each other, around the middle."""
    eta, row, column = torch.zeros(height, width, dtype=torch.float64), height // 2, width // 2
    for n in range(max(height // 2, width // 2) + 1):
        rows, columns = slice(max(row - n, 0), row + n + 1), slice(max(column - n, 0), column + n + 1)
        eta[rows, columns] += 1 / (n + 1) ** (2 if norm == "l2" else 4)
    return eta / length(eta, norm)


def pattern(s, norm, flipped):
    eta = torch.zeros(s, s, dtype=torch.float64)
    if s > 1:
        eta[: s // 2] = bump(s // 2, s, norm)
    eta[s // 2 :] = -bump(s - s // 2, s, norm)
    eta /= length(eta, norm)
    return eta.T if flipped else eta


def stripes(x, eps, signs):
    """signs: [C, W]."""
    return (x + eps * signs[:, None]).clamp(0, 1)


def grid(x, eps, norm, flipped, signs):
    """flipped: [rows, columns] of tiles; signs: [C, rows, columns]."""
    delta, s = torch.zeros_like(x), x.shape[1] // 5
    first = (x.shape[1] - 5 * s) // 2
    for i in range(x.shape[1] // s):
        for j in range(x.shape[2] // s):
            top, left = first + i * s, first + j * s
            eta = pattern(s, norm, flipped[i, j]) * signs[:, i, j, None, None]
            delta[:, top : top + s, left : left + s] += eta
    return filled(x, delta, eps, norm)


def query(x, adv, eps, norm, s, corners, flipped, signs):
    """corners: of the two windows; l_inf has the first alone."""
    c = len(x)
    first, second = ((slice(None), slice(top, top + s), slice(left, left + s)) for top, left in corners)
    if norm == "linf":
        change = torch.zeros_like(x)
        change[first] = 2 * eps * signs[:, None, None]
        return (x + (adv + change - x).clamp(-eps, eps)).clamp(0, 1)
    delta = adv - x
    mask = torch.zeros_like(x)
    mask[first] = mask[second] = 1
    image = length(delta, norm)
    new = []
    for channel in range(c):
        there, held = length(delta[first][channel], norm), length((delta * mask)[channel], norm)
        form = pattern(s, norm, flipped) * signs[channel] + delta[first][channel] / (1e-12 + there)
        if norm == "l2":
            room = ((eps**2 - image**2).clamp_min(0) / c + held**2).sqrt()
        else:
            room = ((eps - image).clamp_min(0) / c + held) * c
        new.append(form / (1e-12 + length(form, norm)) * room)
    delta[second] = 0
    delta[first] = torch.stack(new)
    return filled(x, delta, eps, norm)


def filled(x, delta, eps, norm):
    if norm == "l2":
        return (x + delta / (1e-12 + length(delta, norm)) * eps).clamp(0, 1)
    low, high = torch.zeros(()), delta.abs().max()

    def at(shrink):
        return (x + delta.sign() * (delta.abs() - shrink).clamp_min(0)).clamp(0, 1)

    if length(at(low) - x, norm) <= eps:
        return at(low)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if length(at(middle) - x, norm) > eps else (low, middle)
    return at(high)
