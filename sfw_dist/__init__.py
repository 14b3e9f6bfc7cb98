"""sfw_dist: train a network once with stochastic Frank-Wolfe, then prune it to any sparsity without retraining."""

from sfw_dist.constraints import (
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSupportBall,
    Unconstrained,
    constrain,
)
from sfw_dist.distributed.replicas import verify_replicas
from sfw_dist.optim.baselines import AdaGradSFW, ProjectedSGD
from sfw_dist.optim.comm_hooks import reduce_to_owner
from sfw_dist.optim.initialization import sfw_init
from sfw_dist.optim.sfw import SFW
from sfw_dist.pruning.one_shot import prune
from sfw_dist.pruning.recalibration import recalibrate

__all__ = [
    "SFW",
    "AdaGradSFW",
    "GroupKSupportBall",
    "KSparsePolytope",
    "KSupportBall",
    "LpBall",
    "NuclearBall",
    "ProjectedSGD",
    "SpectralKSupportBall",
    "Unconstrained",
    "constrain",
    "prune",
    "recalibrate",
    "reduce_to_owner",
    "sfw_init",
    "verify_replicas",
]
