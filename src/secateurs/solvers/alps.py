"""ALPS, the reference: ADMM with a growing penalty by eigendecomposition, conjugate gradients on the support."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.layer import LayerProblem, LayerSolution
from secateurs.linalg import Damping, refit_on_mask, unit_gram
from secateurs.scores import dead_first


@dataclass(frozen=True, kw_only=True)
class ALPS:
    """Highly effective LLM pruning by operator splitting (Meng et al. 2024, arXiv 2406.07831, alg. 1 and sec. 3.3).

    On the damped Gram with unit diagonal A and T = goal * scale, with D the sparse copy and V the dual:
        X = (T A - V + rho D)(A + rho I)^-1,    D = keep largest of (X + V / rho),    V += rho (X - D)
    Every third step rho grows by 1.3, 1.2 or 1.1, the faster the more the support still moves; as long as it has never
    moved much, rho is divided by 5 and the iteration starts over instead. It ends when the support stands still. Then
    ten steps of conjugate gradients on the support of X.

    A port of the authors' arithmetic (github.com/mazumder-lab/ALPS at 8af9e6b), kept as it is so that others can be
    compared with it. Differences: the eigendecomposition, float64 as there, runs on the layer's device; figures that
    were only printed are not computed; counts are ours (there round(keep * size)); weights of dead inputs go first;
    conjugate gradients stop row by row. The public code always chooses over the whole matrix: scope "layer".
    Cost: 10-25 d_in^3 flops in float64, then about 30 steps of 2 d_out d_in^2 and 10 times 2 d_in^3 in float64.
    """

    damp: float = 0.01
    damping: Damping = "mean"
    rho: float = 0.1
    """The penalty at the start, in units of the diagonal of A."""
    steps: int = 300
    """At most; about 30 are usual."""
    refit_steps: int = 10

    @property
    def by_rows(self) -> bool:
        """No: its schedule goes by how much of the whole support moves."""
        return False

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """See `Solver.solve`."""
        started = time.perf_counter()
        dead = problem.dead
        goal = problem.goal.detach().float()
        unit = unit_gram(problem.gram.xtx, self.damp, self.damping)

        def keep(x: Tensor) -> Tensor:
            return problem.pattern.mask(dead_first(x.abs(), goal, dead))

        x, steps = self._split(goal * unit.scale, unit.matrix, keep)
        mask = keep(x)
        weight = refit_on_mask(goal, x, unit, mask, self.refit_steps).to(problem.weight.dtype)
        stats = {
            "damp": self.damp,
            "dead_inputs": float(dead.sum()),
            "zeros": float((~mask).count_nonzero()),
            "steps": steps,
        }
        stats["seconds"] = time.perf_counter() - started
        return LayerSolution(weight=weight, mask=mask, outcome=problem.outcome(), stats=stats)

    def _split(self, target: Tensor, a: Tensor, keep) -> tuple[Tensor, float]:
        """The dense copy X when the support has settled, and how many steps that took."""
        values, vectors = torch.linalg.eigh(a.double())

        def inverse(rho: float) -> Tensor:
            return (vectors / (values + rho)).matmul(vectors.T).to(a.dtype)

        rho, moved = self.rho, False
        moments = target @ a
        first = keep(target)
        mask, sparse, dual, x = first, target * first, torch.zeros_like(target), target
        inverted = inverse(rho)
        kept = int(mask.sum())
        for step in range(1, self.steps + 1):
            x = (moments - dual + rho * sparse) @ inverted
            raw = x + dual / rho
            now = keep(raw)
            sparse = raw * now
            dual = dual + rho * (x - sparse)
            if step % 3:
                continue
            change = int((now != mask).sum()) / kept
            mask = now
            if change > 0.1:
                rho, moved = rho * 1.3, True
            elif change > 0.005:
                rho, moved = rho * 1.2, True
            elif change > 0:
                if moved:
                    rho *= 1.1
                else:
                    rho, sparse, dual = rho / 5, target * first, torch.zeros_like(target)
            elif moved:
                return x, float(step)
            else:
                rho /= 5
            rho = min(rho, 1e6)
            if step > 30 and change < 3e-4:
                return x, float(step)
            inverted = inverse(rho)
        return x, float(self.steps)
