"""Networks, checkpoints, autoencoders, and the flow models that are sampled."""

from .flow_model import AdaptiveNetwork, FlowModel, Network, ReversedTime, VelocityFunction
from .load import MODELS, load

__all__ = [
    "MODELS",
    "AdaptiveNetwork",
    "FlowModel",
    "Network",
    "ReversedTime",
    "VelocityFunction",
    "load",
]
