"""sfw_dist: train a network once with stochastic Frank-Wolfe, then prune it to any sparsity without retraining.

This is the library; torch and numpy are all it needs::

    from sfw_dist import SFW, KSparsePolytope, constrain, prune, recalibrate, sweep

    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.05, k_min=10, tau=15.0)), lr=1.0, momentum=0.9)
    ...  # train as with any optimizer
    curve = sweep(net, test_loader, sparsities=[0, 0.5, 0.9], calibration=train_loader)
    prune(net, 0.9)
    recalibrate(net, batches)
"""

from sfw_dist.constraints import (
    Constraint,
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSupportBall,
    Unconstrained,
    constrain,
)
from sfw_dist.deploy import compact
from sfw_dist.distributed.replicas import verify_replicas
from sfw_dist.errors import UserError
from sfw_dist.optim.baselines import AdaGradSFW, ProjectedSGD
from sfw_dist.optim.comm_hooks import reduce_to_owner
from sfw_dist.optim.initialization import sfw_init
from sfw_dist.optim.sfw import SFW
from sfw_dist.pruning import prune, recalibrate, sweep

__version__ = "0.2.0"

__all__ = [
    "SFW",
    "AdaGradSFW",
    "Constraint",
    "GroupKSupportBall",
    "KSparsePolytope",
    "KSupportBall",
    "LpBall",
    "NuclearBall",
    "ProjectedSGD",
    "SpectralKSupportBall",
    "Unconstrained",
    "UserError",
    "__version__",
    "compact",
    "constrain",
    "prune",
    "recalibrate",
    "reduce_to_owner",
    "sfw_init",
    "sweep",
    "verify_replicas",
]
