"""Training steps on a compiled network: what compiling took, and what happens where it fails."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from atlas_kernels.attacks.held import generators

from . import remembered
from .compiled import LIMIT, graphs
from .descent import OptimizerDescent
from .methods import Batch, Metrics, State
from .options import one_line
from .run import Run

TrainStep = Callable[[nn.Module, Batch, Tensor, State, OptimizerDescent], tuple[Tensor, Metrics]]


class CompiledStep:
    """A step on the compiled network of ``run``. Says when graphs of the network are made, and in which time.

    Raises RuntimeError where the network cannot be compiled. With ``on_compile_error="eager"`` the run then says so and
    goes on without, if that is in its first step; this step begins anew.
    """

    def __init__(self, run: Run, train_step: TrainStep, say: Callable[[str], None]) -> None:
        self._run, self._train_step, self._say, self._first = run, train_step, say, True

    def __call__(
        self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: OptimizerDescent
    ) -> tuple[Tensor, Metrics]:
        from torch._dynamo import config, exc

        run = self._run
        retried = self._first and run.config.on_compile_error == "eager"
        begin_anew = put_back_later(run, batch.deal.gathered(batch.ids)) if retried else None
        before, started = graphs(), time.perf_counter()
        try:
            with config.patch(recompile_limit=LIMIT, fail_on_recompile_limit_hit=True):
                outcome = self._train_step(model, batch, key, state, descent)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            said = one_line(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]
            reason = f"the network cannot be compiled ({said})"
            if begin_anew is None:
                raise RuntimeError(
                    f"{reason}: set compile=False, or on_compile_error='eager' for a run that goes on uncompiled if "
                    "its first step fails"
                ) from error
            self._say(f"{reason}; the run goes on without, as on_compile_error='eager' says")
            begin_anew()
            run.network = run.model
            outcome = self._train_step(run.network, batch, key, state, descent)
        if made := graphs() - before:
            seconds = time.perf_counter() - started
            many = "s" if made > 1 else ""
            self._say(f"compile: {made} graph{many} of the network in step {run.step + 1}, which took {seconds:.1f} s")
        self._first = False
        return outcome


def put_back_later(run: Run, ids: Tensor) -> Callable[[], None]:
    """Gives what undoes a step on the images ``ids`` that stopped before its update."""
    indices = [run.device.index or 0] if run.device.type == "cuda" else []
    random = [(generator, generator.get_state()) for generator in generators(indices)]
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
    forget = remembered.put_back_later(run.method, run.memory, ids)

    def put_back() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        for generator, state in random:
            generator.set_state(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        forget()

    return put_back
