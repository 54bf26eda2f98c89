"""Trains in two processes, of which the second fails in the second epoch: `failing_worker.py FOLDER raise|kill`.

With `apart` it has an output folder of its own instead, as on another machine.
"""

import os
import signal
import sys

import torch
import transformers
from test_trainer import new_trainer
from transformers import TrainerCallback


class Fail(TrainerCallback):
    def __init__(self, how):
        self.how = how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raise":
                raise OSError("broken on purpose")


def main(folder, how):
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    if how == "apart":
        folder = os.path.join(folder, os.environ["RANK"])
    trainer = new_trainer(folder, callbacks=[Fail(how)], per_device_train_batch_size=8, logging_strategy="no")
    trainer.train()
    print("finished")


if __name__ == "__main__":
    main(*sys.argv[1:])
