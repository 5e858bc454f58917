"""The entropy grid: uniform steps, unbounded integer codes, stored at the length their frequency deserves.

Error feedback on such a grid with one step is "Huffman-GPTQ" (arXiv 2507.18553); steps that make the cells of
error feedback equally wide in the output are WaterSIC's (arXiv 2603.04956, equation 11). Steps are shared by
all rows unless `rows` says otherwise: at equal steps the rate goes by itself where a row or column needs it.
Differs from both: what is counted is the stream in the file (ptq/coding.py), with everything in it. `bits` is
the total that is wanted; `fit` comes near it, ptq/rate.py meets it.
Shapes: W, codes [groups, out, in]; octaves [groups, units], a unit being `group_size` inputs, or the layer;
row_octaves [groups, out].
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq import coding
from ptq.allocation import Allocation
from ptq.errors import InputError
from ptq.grids.affine import normal_equations
from ptq.grids.grid import check_group_size
from ptq.grids.scaled import RowScaled
from ptq.problem import LayerProblem
from ptq.solvers.error_feedback import output_weight
from ptq.storage import pack_parameter, unpack_parameter

SAMPLE = 2**16  # weights that the first step is estimated from
NEWTON_STEPS = 50  # at most, for that step; about eight are taken
FARTHEST_OCTAVE = 40  # of a unit's step from the layer's
MOST_ROW_BITS = 0.25  # per weight that scales of rows may take: rows of few inputs go without
ROW_SCALE_BITS = 16  # of rows=largest


class Steps(Enum):
    """What shares one step."""

    layer = "layer"
    # `group_size` inputs (one without it), inverse to their weight in the output, where these steps pay
    columns = "columns"


class Rows(Enum):
    """What a row's own scale is, on top of the steps: none where it would take over MOST_ROW_BITS."""

    equal = "equal"  # there is none
    classes = "classes"  # the row's largest magnitude, rounded to fractions of an octave: a few bits, coded
    largest = "largest"  # the row's largest magnitude, in 16 bits


class Decode(Enum):
    """When a layer's codes are read from the stream."""

    at_load = "at_load"  # once: codes are kept in memory
    at_forward = "at_forward"  # in every forward pass: the stream alone is kept


@dataclass(kw_only=True, slots=True)
class Entropy:
    """How to choose the steps of an entropy grid for a target of `bits` stored bits per weight."""

    steps: Steps
    rows: Rows
    octave_parts: int  # a unit's step is the layer's times 2^(k / octave_parts); 4 costs 0.004 bit
    act_order: bool  # for steps=columns: as in the error feedback that is to follow
    damping: float  # likewise, of H, as a fraction of its mean diagonal
    zero_dead: bool  # weights of inputs that are always zero become 0, which costs next to nothing
    tolerance: float  # bits that the stored rate may differ from the target
    most_bits: float  # rates beyond this are refused
    allocation: Allocation  # of the target over the layers: see ptq/rate_allocation.py
    allocation_samples: int  # calibration samples that layers are measured on for it
    parameter_bits: int  # of the layer's step: 16 or 32
    decode: Decode

    def __post_init__(self) -> None:
        if self.parameter_bits not in (16, 32):
            raise InputError(f"parameter_bits must be 16 or 32; got {self.parameter_bits}")
        if self.allocation_samples < 1:
            raise InputError(f"allocation_samples must be at least 1; got {self.allocation_samples}")
        if self.octave_parts < 1 or self.damping <= 0 or self.tolerance <= 0:
            raise InputError(
                "octave_parts must be at least 1, damping and tolerance positive; "
                f"got {self.octave_parts}, {self.damping} and {self.tolerance}"
            )

    def check(self, bits: float, group_size: int | None) -> None:
        """Raise InputError when `bits` or `group_size` cannot be had on this grid."""
        if not 0 < bits <= self.most_bits:
            raise InputError(
                f"bits must be above 0 and at most {self.most_bits:g} on an entropy grid; got {bits:g}"
            )
        check_group_size(group_size)
        if group_size is not None and self.steps is Steps.layer:
            raise InputError(
                f"steps=layer has one step for all inputs and takes no group_size; got {group_size}; "
                "use grid.steps=columns"
            )

    def fit(
        self, W: Tensor, bits: float, group_size: int | None = None, H: Tensor | None = None
    ) -> EntropyGrid | RowScaled:
        """Grid for W [groups, out, in] at about `bits`; H [groups, in, in] shapes steps=columns."""
        self.check(bits, group_size)
        if self._row_scale_bits(W):
            W = W.masked_fill(self._dead(W, H)[:, None], 0)
            largest = W.abs().amax(-1, keepdim=True)
            largest = torch.where(largest > 0, largest, torch.ones_like(largest))
            row_scale = unpack_parameter(*pack_parameter(largest, ROW_SCALE_BITS)).to(W)
            inner = self.fit_steps(W / row_scale, bits, group_size, H)
            return RowScaled(inner=inner, scale=row_scale, scale_bits=ROW_SCALE_BITS)
        return self.fit_steps(W, bits, group_size, H)

    def fit_steps(
        self,
        W: Tensor,
        bits: float,
        group_size: int | None = None,
        H: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> EntropyGrid:
        """The grid without row scales. `weight` [groups, in] is what H says of each input in the error
        feedback that is to follow (`Feedback.weight`), where it is known already.
        """
        dead = self._dead(W, H)
        W = W.masked_fill(dead[:, None], 0)
        size = W.shape[-1] if self.steps is Steps.layer else group_size or 1
        octaves, size = self._octaves(W, H, size, weight)
        grid = EntropyGrid(
            step=W.new_ones(()),
            octaves=octaves,
            row_octaves=self._row_octaves(W),
            dead=dead,
            octave_parts=self.octave_parts,
            unit_size=size,
            code_max=2**15 - 1,
            parameter_bits=self.parameter_bits,
            decode_once=self.decode is Decode.at_load,
        )
        alive = 1 - float(dead.double().mean())  # the rate is theirs alone
        magnitude = W.abs() / grid.relative().to(W.dtype)
        return grid.with_step(_step_for(magnitude, min(bits / alive, self.most_bits), dead)).reaching(W)

    def size(self, W: Tensor, bits: float, group_size: int | None = None) -> dict[str, int]:
        """Bits that W is meant to take, {"codes", "parameters"}: the target, which the rate search meets."""
        self.check(bits, group_size)
        parameters = self.parameter_bits + self._row_scale_bits(W)
        return {"codes": max(0, round(bits * W.numel()) - parameters), "parameters": parameters}

    def _row_scale_bits(self, W: Tensor) -> int:
        """What rows=largest takes on W [groups, out, in]."""
        affordable = MOST_ROW_BITS * W.shape[-1] >= ROW_SCALE_BITS
        return ROW_SCALE_BITS * W.shape[:2].numel() if self.rows is Rows.largest and affordable else 0

    def _dead(self, W: Tensor, H: Tensor | None) -> Tensor:
        """Inputs whose weights are rounded to 0, [groups, in]: none where all inputs are zero."""
        if H is None or not self.zero_dead:
            return torch.zeros(W.shape[0], W.shape[-1], dtype=torch.bool, device=W.device)
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        return (diagonal <= 0) & (diagonal > 0).any()

    def _octaves(self, W: Tensor, H: Tensor | None, size: int, weight: Tensor | None) -> tuple[Tensor, int]:
        """k of each unit, [groups, units], its step over the layer's being 2^(k / octave_parts), and the
        inputs of a unit: `size`, or a whole group's.

        With steps=columns, one step per unit, per group or per layer: whichever takes fewest bits, its own
        among them. What many rows share may be too dear for one.
        """
        groups, in_features = W.shape[0], W.shape[-1]
        flat = torch.zeros(groups, math.ceil(in_features / size), dtype=torch.int64, device=W.device)
        if self.steps is Steps.layer or H is None or not bool((H.diagonal(dim1=-2, dim2=-1) > 0).any()):
            return flat, size
        if weight is None:
            problem = LayerProblem("the grid's layer", W, H)
            weight = output_weight(problem, damping=self.damping, act_order=self.act_order)
        # nothing is known of the inputs that are always zero: they take no part
        logarithm = weight.double().log2().masked_fill(H.diagonal(dim1=-2, dim2=-1) <= 0, math.nan)
        choices = [(flat, size)]
        for unit in dict.fromkeys((size, in_features)):
            units = math.ceil(in_features / unit)
            padded = torch.nn.functional.pad(logarithm, (0, units * unit - in_features), value=math.nan)
            choices.append((self._rounded(-0.5 * padded.reshape(groups, units, unit).nanmean(-1)), unit))
        return min(choices, key=lambda choice: self._bits(choice[0], choice[1], logarithm, W))

    def _bits(self, octaves: Tensor, size: int, logarithm: Tensor, W: Tensor) -> float:
        """Bits per weight for an error of one with these steps, up to a constant: at high rate steps r lead
        to ½ log2 Σ w r² − Σ log2 r for inputs of weight w (means over inputs); `logarithm` is log2 w. Unlike
        steps are paid for twice: codes of unlike size make the coder say how large each column's are.
        """
        log_step = (octaves / self.octave_parts).repeat_interleave(size, -1)[:, : W.shape[-1]]
        alive = ~logarithm.isnan()
        squares = (logarithm + 2 * log_step)[alive]
        largest = squares.max()
        rate = 0.5 * (largest + torch.exp2(squares - largest).mean().log2()) - log_step[alive].mean()
        side = coding.side_bits(octaves.cpu().numpy().reshape(-1)) if bool(octaves.any()) else 0
        return float(alive.double().mean() * rate) + 2 * side / W.numel()

    def _row_octaves(self, W: Tensor) -> Tensor:
        """k of each row, [groups, out]: 0 but for rows=classes, and for rows of zeros."""
        largest = W.abs().amax(-1).double()
        if self.rows is not Rows.classes or not bool((largest > 0).any()):
            return torch.zeros(largest.shape, dtype=torch.int64, device=W.device)
        usual = largest[largest > 0].median()
        octaves = self._rounded(torch.where(largest > 0, largest, usual).log2())
        dear = coding.side_bits(octaves.cpu().numpy().reshape(-1)) > MOST_ROW_BITS * W.numel()
        return torch.zeros_like(octaves) if dear else octaves

    def _rounded(self, logarithm: Tensor) -> Tensor:
        """Octaves around their median; 0 where the logarithm is not known (NaN)."""
        octaves = ((logarithm - logarithm.nanmedian()) * self.octave_parts).nan_to_num(0.0).round().long()
        farthest = FARTHEST_OCTAVE * self.octave_parts
        return octaves.clamp(-farthest, farthest)


def _step_for(x: Tensor, bits: float, dead: Tensor) -> float:
    """Step at which magnitudes x of inputs that are not dead, in units of their columns' steps, take about
    `bits` each.

    ½ log2(1 + 2πe σ²) is within 0.1 bit of a rounded Gaussian's entropy from 0.7 bits up; σ² of a weight is
    the product of its row's and its column's mean square over the whole mean.
    """
    square = x.double().square()
    mean = float(square.mean())
    if mean <= 0:
        return 1.0
    rows, columns = x.shape[1:]
    every = max(1, int((~dead).sum()) * rows // SAMPLE)
    kept = torch.arange(0, x.numel(), every, device=x.device)
    if bool(dead.any()):
        kept = (~dead[:, None]).expand(x.shape).reshape(-1).nonzero()[::every, 0]
    group, row, column = kept // (rows * columns), kept // columns % rows, kept % columns
    variance = square.mean(-1)[group, row] * square.mean(-2)[group, column]
    variance = variance / square.mean((-2, -1)).clamp_min(1e-300)[group]
    if not bool((variance > 0).any()):
        return mean**0.5
    # Newton's method for the step's log2 over the root mean square; the rate is convex in it, and from where
    # it would be without the 1, which is below, the iterates rise to the root
    size = 2 * math.pi * math.e * variance[variance > 0] / mean
    share = len(size) / len(variance)
    octave = float(0.5 * size.log2().mean()) - bits / share
    for _ in range(NEWTON_STEPS):
        ratio = size * 4.0**-octave
        excess = share * float(0.5 * torch.log2(1 + ratio).mean()) - bits
        step = excess / (share * float((ratio / (1 + ratio)).mean()))
        octave += step
        if abs(step) < 1e-9:
            break
    return mean**0.5 * 2.0**octave


@dataclass(kw_only=True, slots=True)
class EntropyGrid:
    """A fitted entropy grid: value = step · 2^((octaves + row_octaves) / octave_parts) · code."""

    step: Tensor  # scalar
    octaves: Tensor  # [groups, units] int64
    row_octaves: Tensor  # [groups, out] int64
    dead: Tensor  # [groups, in] bool, inputs whose weights are rounded to 0
    octave_parts: int
    unit_size: int  # inputs of a unit
    code_max: int  # not a clipping range: how far the integer type reaches
    parameter_bits: int
    decode_once: bool

    @property
    def code_min(self) -> int:
        return -self.code_max

    @property
    def shared(self) -> bool:
        """Rows share the layer's step."""
        return True

    def columns(self) -> Tensor:
        """Step of each input over the layer's, [groups, in] float64."""
        relative = torch.exp2(self.octaves.double() / self.octave_parts)
        return relative.repeat_interleave(self.unit_size, -1)[:, : self.dead.shape[-1]]

    def relative(self) -> Tensor:
        """Step of each weight over the layer's, [groups, 1 | out, in] float64."""
        columns = self.columns()[:, None]
        return columns * self._row_factors() if bool(self.row_octaves.any()) else columns

    def _row_factors(self) -> Tensor:
        return torch.exp2(self.row_octaves.double() / self.octave_parts)[..., None]  # [groups, out, 1]

    def _steps(self) -> Tensor:
        """[groups, 1 | out, in] in the step's dtype."""
        return (self.step.double() * self.relative()).to(self.step.dtype)

    def round(self, W: Tensor) -> Tensor:
        x = (W / self._steps()).round().clamp(self.code_min, self.code_max)
        x = x.masked_fill(self.dead[:, None], 0)
        return x.to(torch.int16 if self.code_max < 2**15 else torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        return codes.to(self.step.dtype) * self._steps()

    def round_column(self, w: Tensor, column: int | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(column, int):
            octaves, dead = self.octaves[:, column // self.unit_size, None], self.dead[:, column, None]
        else:
            octaves, dead = self.octaves.gather(-1, column // self.unit_size), self.dead.gather(-1, column)
        relative = torch.exp2(octaves.double() / self.octave_parts)
        if bool(self.row_octaves.any()):
            relative = relative * self._row_factors()[..., 0]
        step = (self.step.double() * relative).to(self.step.dtype)
        codes = (w / step).round_().clamp_(self.code_min, self.code_max).masked_fill_(dead, 0)
        return codes, codes * step

    def refit(self, codes: Tensor, W: Tensor, H: Tensor) -> EntropyGrid:
        """Least squares for the layer's step; the other steps keep their ratio to it."""
        basis = codes.double() * self.relative()
        M, v = (x.sum().double() for x in normal_equations([basis], W.double(), H.double(), None))
        step = float(v / M) if float(M) > 0 else 0.0
        if not 0 < step < math.inf:
            return self
        new = self.with_step(step)
        steps = torch.stack([self.step, new.step]).double()
        before, after = (M * steps.square() - 2 * v * steps).tolist()
        return new if after < before else self

    def with_step(self, step: float) -> EntropyGrid:
        """The grid with another step for the layer, as a file would return it."""
        wanted = torch.full_like(self.step, step)
        return replace(self, step=wanted).as_stored()

    def reaching(self, W: Tensor) -> EntropyGrid:
        """The grid with integers that hold W and what error feedback may add to it: 16 bits mostly."""
        largest = float((W.abs() / self._steps()).max())
        return replace(self, code_max=2**15 - 1 if largest < 2**11 else 2**30)

    def where(self, better: Tensor, other: EntropyGrid) -> EntropyGrid:
        """Rows share all steps: `self` if it is better for every row."""
        return self if bool(better.all()) else other

    def replace_unit(self, unit: int, other: EntropyGrid) -> EntropyGrid:
        """The grid as it is: a unit's step follows from H, which the weights met on the way do not change."""
        return self

    def scaled(self, factor: float) -> EntropyGrid:
        return self.with_step(float(self.step) * factor)

    def parameters(self) -> dict[str, Tensor]:
        return {"step": self.step}

    def with_parameters(self, parameters: dict[str, Tensor]) -> EntropyGrid:
        return replace(self, step=parameters["step"])

    def as_stored(self) -> EntropyGrid:
        stored = unpack_parameter(*pack_parameter(self.step, self.parameter_bits))
        return replace(self, step=stored.to(self.step.dtype).to(self.step.device))

    def stream(self, codes: Tensor) -> bytes:
        """The coded form of codes [groups, out, in] and of the units' and rows' steps."""
        matrix = codes.detach().cpu().numpy().astype(np.int64).reshape(-1, codes.shape[-1])
        extras = [octaves.cpu().numpy().reshape(-1) for octaves in (self.octaves, self.row_octaves)]
        return coding.encode(matrix, [octaves for octaves in extras if octaves.any()])

    def storage(self, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        stream = self.stream(codes)
        step, exponent = pack_parameter(self.step.reshape(1), self.parameter_bits)
        tensors = {
            "codes": torch.frombuffer(bytearray(stream), dtype=torch.uint8).to(codes.device),
            "step": step,
        }
        facts: dict[str, Any] = {
            "grid": "ptq.grids.entropy.EntropyGrid",
            "bits": round(8 * len(stream) / codes.numel(), 3),
            "shape": list(codes.shape),
            "code_max": self.code_max,
            "unit_size": self.unit_size,
            "octave_parts": self.octave_parts,
            "flat": not bool(self.octaves.any()),
            "flat_rows": not bool(self.row_octaves.any()),
            "parameter_bits": self.parameter_bits,
            "step_exponent": exponent,
            "checksum": zlib.crc32(stream),
        }
        if self.decode_once:
            facts["decode_once"] = True
        return tensors, facts

    @classmethod
    def from_storage(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[EntropyGrid, Tensor]:
        """The grid and the codes that `storage` wrote. Raises InputError on a damaged stream."""
        stream = tensors["codes"].cpu().numpy().tobytes()
        if zlib.crc32(stream) != facts["checksum"]:
            raise InputError(
                f"the coded weights have checksum {zlib.crc32(stream)}, the file says {facts['checksum']}; "
                "it is damaged or cut short: save the model again"
            )
        shape, device = tuple(facts["shape"]), tensors["codes"].device
        units = math.ceil(shape[-1] / facts["unit_size"])
        counts = {"flat": (shape[0], units), "flat_rows": shape[:2]}
        lengths = [math.prod(count) for key, count in counts.items() if not facts[key]]
        matrix, extras = coding.decode(stream, (math.prod(shape[:-1]), shape[-1]), lengths)
        octaves, row_octaves = (
            torch.zeros(count, dtype=torch.int64, device=device)
            if facts[key]
            else torch.from_numpy(extras.pop(0)).reshape(count).to(device)
            for key, count in counts.items()
        )
        grid = cls(
            step=unpack_parameter(tensors["step"], facts["step_exponent"]).reshape(()).to(device),
            octaves=octaves,
            row_octaves=row_octaves,
            dead=torch.zeros(shape[0], shape[-1], dtype=torch.bool, device=device),
            octave_parts=int(facts["octave_parts"]),
            unit_size=int(facts["unit_size"]),
            code_max=int(facts["code_max"]),
            parameter_bits=int(facts["parameter_bits"]),
            decode_once="decode_once" in facts,
        )
        dtype = torch.int16 if grid.code_max < 2**15 else torch.int32
        return grid, torch.from_numpy(matrix).to(dtype).reshape(shape).to(device)

    def storage_bits(self, codes: Tensor) -> dict[str, int]:
        return {"codes": 8 * len(self.stream(codes)), "parameters": self.parameter_bits}
