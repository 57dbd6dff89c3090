"""The tape: which parametric call ran, with which input and output, and what flows back through it."""

from laplace_kf.tape.blocks import Block, FlatLayout
from laplace_kf.tape.chain import Chain
from laplace_kf.tape.observation import Observation, Patterns
from laplace_kf.tape.output_signals import OutputSignals
from laplace_kf.tape.select import patterns, select
from laplace_kf.tape.signals import GradientSignals, LookupSignals, OuterSignals, Signals
from laplace_kf.tape.single_weights import EntryBlock, EntryLayout
from laplace_kf.tape.tied import MatrixSignals, TiedSignals
from laplace_kf.tape.tracer import UNUSED, Tracer

__all__ = [
    "UNUSED",
    "Block",
    "Chain",
    "EntryBlock",
    "EntryLayout",
    "FlatLayout",
    "GradientSignals",
    "LookupSignals",
    "MatrixSignals",
    "Observation",
    "OuterSignals",
    "OutputSignals",
    "Patterns",
    "Signals",
    "TiedSignals",
    "Tracer",
    "patterns",
    "select",
]
