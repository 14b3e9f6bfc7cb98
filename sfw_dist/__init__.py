"""sfw_dist: train a network once with stochastic Frank-Wolfe, then prune it to any sparsity without retraining."""

from sfw_dist.binding import constrain
from sfw_dist.comm_hook import reduce_to_owner
from sfw_dist.constraints import KSparsePolytope, KSupportBall, LpBall, Unconstrained
from sfw_dist.init import sfw_init
from sfw_dist.optim import SFW
from sfw_dist.prune import prune
from sfw_dist.recalibration import recalibrate
from sfw_dist.replicas import verify_replicas
from sfw_dist.structured import GroupKSupportBall, NuclearBall, SpectralKSupportBall
from sfw_dist.variants import AdaGradSFW, ProjectedSGD

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
