"""AdaMax for towers of hyperopt_ext."""

from dataclasses import dataclass

from hyperopt_ext.extension import Betas, load_rules

load_rules("hyperopt_adamax._rules")


@dataclass(frozen=True, eq=False, repr=False)
class Adamax(Betas):
    """AdaMax (Kingma & Ba, ICLR 2015, Algorithm 2), as in ``torch.optim.Adamax``."""

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @classmethod
    def rule_for(cls, names, **structure):
        return "adamax"
