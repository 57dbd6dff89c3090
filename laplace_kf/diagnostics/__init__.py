"""What can be found out about a network's curvature: checks of derivatives, exact references, and how good factors are.

Most of it is dense and for small networks; every function says what it needs. Models are left exactly as they were.
"""

from laplace_kf.diagnostics.asymptotics import Convergence, convergence
from laplace_kf.diagnostics.bounds import Ranks, ranks, reduction_bound
from laplace_kf.diagnostics.checking import Check, check
from laplace_kf.diagnostics.costs import Costs, costs
from laplace_kf.diagnostics.direction import Steps, alignment, block_diagonal_residual, gauss_newton_steps
from laplace_kf.diagnostics.expectation import kronecker_error
from laplace_kf.diagnostics.fisher import Structure, fisher_structure
from laplace_kf.diagnostics.matrices import hessian, jacobian, quadratic_form
from laplace_kf.diagnostics.record import Record
from laplace_kf.diagnostics.recursions import blocks
from laplace_kf.diagnostics.surfaces import DampingStudy, damping_study, loss_surface
from laplace_kf.diagnostics.twins import Invariance, invariance

__all__ = [
    "Check",
    "Convergence",
    "Costs",
    "DampingStudy",
    "Invariance",
    "Ranks",
    "Record",
    "Steps",
    "Structure",
    "alignment",
    "block_diagonal_residual",
    "blocks",
    "check",
    "convergence",
    "costs",
    "damping_study",
    "fisher_structure",
    "gauss_newton_steps",
    "hessian",
    "invariance",
    "jacobian",
    "kronecker_error",
    "loss_surface",
    "quadratic_form",
    "ranks",
    "reduction_bound",
]
