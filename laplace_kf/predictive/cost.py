"""What a Monte Carlo prediction costs in either sampling space, in multiply-adds; ``space="auto"`` takes the cheaper.

For ``N`` inputs, ``S`` draws and a block ``W (O, I)`` with dense eigenbases on both sides:

* weights: ``S`` times ``NOISE · O I`` for the random numbers, plus the cheaper of making ``W`` and using it
  (``O²I + O I² + N O I``) and of passing the inputs through its factors (``N (I² + O I + O²)``);
* pre-activations: ``S N`` times ``I²`` (rotation) ``+ O I`` (mean) ``+ O I`` (variances) ``+ O²`` (rotation back)
  ``+ NOISE · O``. The first block's inputs are the same for every draw, so its rotation, mean and variances are
  counted ``N`` times, not ``S N``.

An identity basis (a diagonal posterior; token inputs) has no rotation. ``NOISE`` is the price of one standard normal
number in multiply-adds of a large product, measured on one core; weights lose by it wherever few inputs share a draw.
What the rest of the network costs is the same in both spaces and is left out, and so is the overhead of a call.
"""

from __future__ import annotations

from laplace_kf.operators import Blockwise, LowRank, Matrix, Spectral
from laplace_kf.predictive.activations import factorises, is_linear, refusal
from laplace_kf.predictive.weights import chain_is_cheaper
from laplace_kf.tape import Block

__all__ = ["NOISE", "activation_cost", "activations_are_cheaper", "draw_cost", "rotations", "weight_cost"]

NOISE = 250


def weight_cost(precision: Blockwise, inputs: int, samples: int) -> float:
    """Multiply-adds of ``samples`` weight draws and of ``inputs`` inputs through each."""
    total = 0.0
    for block, matrix in precision.entries:
        each = float(NOISE * block.size)
        if is_linear(block) and isinstance(matrix, Spectral) and factorises(block, matrix):
            _, out, inp = block.shape
            right, left = rotations(matrix)
            chain = inputs * (right + out * inp + left)
            formed = _draw(block, matrix) + inputs * out * inp
            each += chain if chain_is_cheaper(inputs, matrix) else formed
        else:
            each += _draw(block, matrix) + inputs * block.size
        total += samples * each
    return total


def activation_cost(precision: Blockwise, inputs: int, samples: int) -> float:
    """Multiply-adds of ``samples`` draws of every pre-activation of ``inputs`` inputs; infinite if it cannot."""
    total = 0.0
    for number, (block, matrix) in enumerate(precision.entries):
        if refusal(block, matrix) is not None:
            return float("inf")
        assert isinstance(matrix, Spectral)
        if not block.factorises:
            total += samples * inputs * NOISE * block.size
            continue
        _, out, inp = block.shape
        right, left = rotations(matrix)
        total += inputs * (right + 2 * out * inp) * (samples if number else 1) + out * inp
        total += samples * inputs * (left + NOISE * out)
    return total


def activations_are_cheaper(precision: Blockwise, inputs: int, samples: int) -> bool:
    """Whether pre-activations can be drawn (as far as the posterior tells) and take fewer multiply-adds."""
    return activation_cost(precision, inputs, samples) < weight_cost(precision, inputs, samples)


def rotations(matrix: Spectral) -> tuple[int, int]:
    """Multiply-adds per input of the input side's and of the output side's rotation."""
    _, out, inp = matrix.grid.shape
    return (inp * inp if matrix.inputs.dual is not None else 0), (out * out if matrix.outputs.dual is not None else 0)


def draw_cost(precision: Blockwise) -> float:
    """Multiply-adds of one draw of all weights."""
    return sum(NOISE * block.size + _draw(block, matrix) for block, matrix in precision.entries)


def _draw(block: Block, matrix: Matrix) -> float:
    """Multiply-adds of making one draw of a block from its noise."""
    if isinstance(matrix, LowRank):
        return 2.0 * matrix.values.shape[0] * block.size
    if not isinstance(matrix, Spectral):
        return float(block.size) ** 2
    groups, out, inp = matrix.grid.shape
    right, left = rotations(matrix)
    return float(groups) * (out * right + left * inp)
