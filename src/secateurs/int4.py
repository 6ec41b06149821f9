"""The numbers that int4 has: -8 to 7 times a scale, one for each 64 neighbouring weights of a row."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

GROUP = 64
LOWEST, HIGHEST = -8, 7
LARGEST_AT = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)  # where the largest weight of a group may lie; beyond 8 it is clipped
WHOLE_AT = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # where it lies too in weights that are such numbers already
DIGITS = 8  # binary ones of a bfloat16
EXACT = 5  # of a scale whose products with -8 to 7 are bfloat16 as well
AT_ONCE = 1 << 16  # weights whose scales are looked for while a CPU's cache has them


def group_scales(
    weight: Float32[Tensor, "rows d_in"], energy: Float[Tensor, " d_in"] | None = None, digits: int = DIGITS
) -> Float32[Tensor, "rows groups"]:
    """For every group, the scale with so many binary digits that loses least when its weights are rounded.

    The weight furthest from zero goes to one of LARGEST_AT, on the negative side, which has a number more, or of
    WHOLE_AT: what was rounded before is found again exactly. The loss is squared, each input's times its `energy`.
    Scales of groups that are all zero are zero.
    """
    price = None if energy is None else _grouped(energy[None])
    rows_at_once = max(1, AT_ONCE // max(weight.shape[1], 1)) if weight.device.type == "cpu" else max(1, len(weight))
    return torch.cat([_scales(_grouped(rows), price, digits) for rows in weight.split(rows_at_once)])


def _scales(
    groups: Float32[Tensor, "rows groups 64"], price: Float[Tensor, "1 groups 64"] | None, digits: int
) -> Float32[Tensor, "rows groups"]:
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for at in LARGEST_AT + WHOLE_AT:
        scale = _rounded_off(-largest / at, digits)
        lost = (nearest(groups, torch.where(scale == 0, 1, scale)) * scale).sub_(groups).square_()
        lost = (lost if price is None else lost.mul_(price)).sum(2, keepdim=True)
        best, least = torch.where(lost < least, scale, best), lost.minimum(least)
    return best.squeeze(2)


def numbers_of(
    weight: Float32[Tensor, "rows d_in"], scales: Float32[Tensor, "rows groups"]
) -> Float32[Tensor, "rows d_in"]:
    """Which of -8 to 7 each weight is nearest to, in units of its group's scale."""
    each = torch.where(scales == 0, 1, scales).repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    return nearest(weight, each)


def nearest(weight: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape2"]) -> Float[Tensor, "*shape"]:
    """Which of -8 to 7 is nearest, in units of `scale`, which is not 0."""
    return (weight / scale).round_().clamp_(LOWEST, HIGHEST)


def _grouped(matrix: Tensor) -> Tensor:
    """[rows, d_in] as [rows, groups, 64], with zeros behind it."""
    return nn.functional.pad(matrix, (0, -matrix.shape[1] % GROUP)).view(len(matrix), -1, GROUP)


def _rounded_off(number: Float32[Tensor, "*shape"], digits: int) -> Float32[Tensor, "*shape"]:
    """To so many binary digits, by the bits of the number: exact on every device."""
    dropped = 24 - digits
    return ((number.view(torch.int32) + (1 << dropped - 1)) & -(1 << dropped)).view(torch.float32)
