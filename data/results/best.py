"""data/results/best.py: --keep_best METRIC: keep the weights that were best on valid, stop without gain.

    gain    an evaluation whose METRIC is better than at all evaluations before; of two equal ones the earlier
            is the best. NaN is never a gain
    stop    after --patience evaluations in a row without gain (Prechelt 1998, Early Stopping - But When?)

Which direction is better stands in metrics.py. The best weights so far are part of state.pt, so that a run
which is interrupted and continued keeps the same ones. They take as much memory as the trainable parameters.

Public: KeepBestFlags, Best, check_metric
"""
from dataclasses import dataclass

import torch

from data.results.metrics import LOWER_IS_BETTER
from data.runtime.files import UserError
from data.runtime.flags import flag
from data.runtime.run_folder import log_progress

NOT_A_SCORE = ("targets", "pairs", "prompts")           # counts among the metrics


@dataclass(frozen=True)
class KeepBestFlags:
    """training"""
    keep_best: str = flag(None, "save and test the weights of the evaluation on valid with the best METRIC, "
                          "not the last ones", type=str)
    patience: int = flag(0, "with --keep_best: stop after N evaluations without gain; 0: never", low=0)

    @staticmethod
    def check(cfg):
        if cfg.patience and cfg.keep_best is None:
            raise UserError(f"--patience {cfg.patience} counts evaluations without gain in a metric; name it "
                            "by --keep_best METRIC")


def check_metric(name, metrics):
    """Raises UserError unless --keep_best names one of `metrics`, those of an evaluation on valid."""
    known = [metric for metric in metrics if metric not in NOT_A_SCORE]
    if name not in known:
        raise UserError(f"--keep_best {name} is no metric of this run on valid; there are {', '.join(known)}")


class Best:
    """The best evaluation so far: its step, value and weights. Without a metric it keeps nothing.

    metric     a name among the metrics on valid, or None
    patience   evaluations without gain after which training stops; 0: never
    """

    def __init__(self, metric=None, patience=0):
        self.metric = metric
        self.patience = patience
        self.step = None
        self.value = None
        self.weights = {}
        self.without_gain = 0                       # evaluations since the best one
        self.last_step = 0                          # of the last evaluation: a resume repeats it

    @torch.no_grad()
    def consider(self, step, metrics, trainable):
        """After an evaluation: copy the weights, {name: parameter}, if they are the best so far."""
        if self.metric is None or step == self.last_step:
            return
        self.last_step = step
        value = metrics[self.metric]
        if value != value or self.value is not None and not self.better(value, self.value):
            self.without_gain += 1
            return
        self.step = step
        self.value = value
        self.weights = {name: p.detach().clone() for name, p in trainable.items()}
        self.without_gain = 0

    def better(self, value, other):
        return value < other if self.metric in LOWER_IS_BETTER else value > other

    def patience_is_over(self):
        return 0 < self.patience <= self.without_gain

    @torch.no_grad()
    def restore(self, trainable):
        """The best weights into the parameters; they stay as they are if nothing was kept."""
        if not self.last_step:                      # nothing was asked for, or no step was made
            return
        if self.step is None:
            log_progress(f"--keep_best {self.metric}: it was never a number on valid; the last weights stay")
            return
        for name, p in trainable.items():
            p.data.copy_(self.weights[name])
        log_progress(f"the weights of step {self.step} are kept: {self.metric} on valid was "
                     f"{self.value:.4g}, the best of all evaluations")

    def summary(self):
        """For result.json; {} if nothing was kept."""
        if self.step is None:
            return {}
        return {"best_valid": dict(metric=self.metric, value=self.value, step=self.step)}

    def state_dict(self):
        names = ("step", "value", "weights", "without_gain", "last_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)
