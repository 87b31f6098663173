"""What a trainer shows and keeps: progress, the reward on held-out notes, one group of completions,
checkpoints.

What trains is TRL's SFTTrainer and GRPOTrainer, called in the notebooks. Taught in notebooks 3 and
4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import models
from helpers.machinery import memory, places

if TYPE_CHECKING:
    import pandas as pd
    import torch

LOGGED = {"loss", "reward", "eval_loss", "eval_reward"}


def defaults(dtype: torch.dtype, **arguments: Any) -> dict[str, Any]:
    """Arguments that every trainer of the course gets, for SFTConfig and GRPOConfig, and the given
    ones shared out among the processes of a launch."""
    import torch

    has_card = torch.cuda.is_available()
    is_older = has_card and dtype == torch.float32  # its 4-bit layers compute in float16
    return {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16 or is_older,
        "save_total_limit": 1,
        "report_to": "none",  # no tracker: logs of real notes stay on the machine
        "disable_tqdm": True,
        "dataloader_pin_memory": has_card,
        "ddp_find_unused_parameters": False,
        "use_cpu": not has_card,  # where the model is, on a Mac too
    } | memory.per_device(arguments)


def run(trainer: Any, work: Path, stage: str) -> None:
    """Train, from the last checkpoint in `work` where there is one. Raises MemoryError that says
    what to lower."""
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    trainer.remove_callback(PrinterCallback)  # the curve and the progress bar say it better
    models.float32_adapters(trainer.model)
    checkpoint = get_last_checkpoint(work) if work.is_dir() else None
    with memory.advice(stage):
        trainer.train(resume_from_checkpoint=checkpoint)


def save(trainer: Any, folder: Path) -> pd.DataFrame:
    """Write adapter, tokenizer and training_log.csv (one row a step) to a folder; returns the
    log."""
    import pandas as pd

    trainer.save_model(folder)  # where several devices share the weights, gathered
    # A pickle that names folders of this machine.
    (folder / "training_args.bin").unlink(missing_ok=True)
    history = trainer.state.log_history
    # With fewer steps than logging_steps the last row has all there is, the mean loss.
    rows = [row for row in history if not LOGGED.isdisjoint(row)] or history[-1:]
    log = pd.DataFrame(rows).rename(columns={"train_loss": "loss"})
    log = log.groupby("step", as_index=False).first()
    log.to_csv(folder / "training_log.csv", index=False)
    return log


def Steps(label: str) -> Any:
    """A callback for a Hugging Face trainer that shows its steps as a progress bar.

    It also makes the order of the rows depend on seed and epoch alone: a training that goes on sees
    what it would have seen, and every process of a launch deals from the same deck. Trainers draw
    it from the state that the epochs before left. And a training that goes on from its very last
    step makes none more, as trainers would.
    """
    import torch
    from transformers import TrainerCallback

    if memory.processes() > 1:
        _know_cpu_by_number()

    class Bar(TrainerCallback):
        def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
            rows = train_dataloader.batch_sampler
            # Accelerate's deals them out to the processes.
            while hasattr(rows, "batch_sampler"):
                rows = rows.batch_sampler
            # Killed between its last checkpoint and its end.
            if state.global_step >= state.max_steps:
                rows.sampler = ()
            else:
                seed = args.seed + int(state.epoch or 0)
                rows.sampler.generator = torch.Generator().manual_seed(seed)

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if args.gradient_checkpointing and hasattr(model, "get_base_model"):
                # TRL switches it on anew after every generation, and each time adds one more hook
                # for good
                model.get_base_model().enable_input_require_grads = lambda: None
            self.bar = places.progress(state.max_steps, label)
            self.bar.update(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Bar()


def HeldOut(
    every: int, measure: Callable[[], float], show: Callable[[dict[str, float]], Any] | None = None
) -> Any:
    """A callback that puts `measure()`, a reward on notes that are not trained on, into the log as
    `eval_reward`.

    At the start, every so many steps and at the end; once for each step, also where a training goes
    on. `show` gets the row too.
    """
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            steps = [row["step"] for row in state.log_history if "eval_reward" in row]
            if state.global_step not in steps:
                row = {"step": state.global_step, "eval_reward": measure()}
                state.log_history.append(row)  # saved with each checkpoint
                if show:
                    show(row)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.on_train_begin(args, state, control)

    return Watching()


def OneGroup(every: int, size: int, draw: Callable[[list[str], list[str]], Any]) -> Any:
    """A callback that shows, every so many steps, the first group of completions, drawn over the
    one before.

    Its `watching(reward)` is the reward itself, under its own name, with a look at what it is
    asked. size: completions of a group. draw: (completions, gold codes) -> figure.
    """
    from IPython.display import display
    from transformers import TrainerCallback

    class Group(TrainerCallback):
        group = None
        handle = None

        def watching(self, reward):
            @functools.wraps(reward)
            def watched(completions, code, **columns):
                self.group = completions[:size], code[:size]
                return reward(completions, code, **columns)

            return watched

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every or not state.is_world_process_zero or not self.group:
                return
            completions, codes = self.group
            figure = draw([message[0]["content"] for message in completions], codes)
            if self.handle:
                self.handle.update(figure)
            else:
                self.handle = display(figure, display_id=True)

    return Group()


@functools.cache  # torch takes it once
def _know_cpu_by_number() -> None:
    """Let torch load a checkpoint to "cpu:0", which is what a launched process without a GPU calls
    its device."""
    from torch.serialization import register_package

    def load(obj: Any, place: str) -> Any:
        return obj if place.startswith("cpu:") else None

    register_package(15, lambda obj: None, load)
