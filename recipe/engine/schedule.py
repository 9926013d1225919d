"""DeepSpeed's WarmupLR, corrected to the paper's warmup and followed by the decay.

WarmupLR itself is one step late (its first two updates both use ``warmup_min_lr``), is not advanced when fp16 skips
an update, and has no decay. Here the rate of an update is a pure function of its number.
"""

from deepspeed.runtime.lr_schedules import WarmupLR
from torch.optim import Optimizer

from recipe.plan import RateSchedule


class PaperLR(WarmupLR):
    """Sets the optimizer's rate to ``schedule.rate(t)``, where t is the number of the next update, from 0.

    DeepSpeed calls ``step()`` after each update that it applied; ``step(t)`` sets the rate of update t.
    """

    def __init__(self, optimizer: Optimizer, schedule: RateSchedule) -> None:
        self.schedule = schedule
        super().__init__(
            optimizer,
            warmup_min_lr=schedule.start_rate,
            warmup_max_lr=schedule.peak_rate,
            warmup_num_steps=max(1, schedule.warmup_steps),
            warmup_type=schedule.warmup_type,
            last_batch_iteration=0,
        )
        self.step(0)

    def get_lr(self) -> list[float]:
        """The rate of the next update, for each parameter group."""
        return [self.schedule.rate(self.last_batch_iteration)] * len(self.optimizer.param_groups)
