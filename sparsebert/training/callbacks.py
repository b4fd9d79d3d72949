"""Mask training, soft movement and magnitude pruning inside stock `transformers.Trainer`.

>>> # Before the Trainer, whose optimizer takes the parameters with requires_grad.
>>> masks = MaskTraining(model, parse("32x1"), 0.7, init="soft", gradual=0.0)
>>> Trainer(model, arguments, train_dataset=rows, callbacks=[SubnetCallback(masks)]).train()
>>> masks.fold()  # zeros into the weights; save the model as any other
"""

from __future__ import annotations

from transformers import TrainerCallback

from sparsebert.training.loop import Hook


class SubnetCallback(TrainerCallback):
    """Calls a hook (MaskTraining, SoftMovement, MagnitudePruning, FixedZeros) at the Trainer's steps.

    The Trainer keeps its learning-rate schedule, so MagnitudePruning with `rewind_to` gets one schedule over the whole
    run.
    """

    def __init__(self, hook: Hook):
        self.hook = hook

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.hook.before(state.global_step, state.max_steps) and optimizer is not None:
            optimizer.state.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.hook.regularise()

    def on_step_end(self, args, state, control, **kwargs):
        self.hook.after()
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:
            self.hook.settle()

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.before(state.max_steps, state.max_steps)
