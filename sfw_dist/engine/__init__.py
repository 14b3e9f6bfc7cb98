"""How a model is trained on several ranks."""

from sfw_dist.engine.ddp import DDPEngine

__all__ = ["DDPEngine"]
