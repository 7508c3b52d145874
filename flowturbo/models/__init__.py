"""Networks, checkpoints, autoencoders, and the flow models that are sampled."""

from .bundled import MODELS
from .flow_model import AdaptiveNetwork, FlowModel, Network, ReversedTime, VelocityFunction
from .load import load

__all__ = [
    "MODELS",
    "AdaptiveNetwork",
    "FlowModel",
    "Network",
    "ReversedTime",
    "VelocityFunction",
    "load",
]
