"""What an attack changes of a network for its time, put back whatever happens: errors, Ctrl-C, threads, other orders.

Attacks under way are known here, in the order in which they began. One that ends while a later one goes on leaves to
that what it found, so that after the last of them everything is as it was before the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import RLock, get_ident
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_lock = RLock()
_under_way: list[_Held] = []

Modes = Mapping[nn.Module, bool]
Put = Callable[[Any, Any], None]


@contextmanager
def put_back(
    model: Callable[[Tensor], Any],
    training: bool | Modes | None = None,
    *,
    freeze: bool = False,
    copy_buffers: bool = False,
    update_buffers: bool = False,
    seeds: Mapping[torch.Generator, int | None] | None = None,
    alone: bool | None = None,
) -> Iterator[None]:
    """Inside, ``model`` is changed as asked; at the end what this and the network have changed of it is as it was.

    Args:
        model: a module, or a function, whose modules are looked for (see ``modules_of``).
        training: the mode of all modules, or of each; None: as found. ``train()`` and ``eval()`` are not called, so an
            override of theirs has no side effect.
        freeze: no parameter of a module requires a gradient.
        copy_buffers: the network works on copies of its buffers; the originals are not written to. So it does on copies
            of parameters made in inference mode, which autograd cannot use.
        update_buffers: but modules in train mode write their own buffers.
        seeds: the random generators to put back, and what to seed them with; None: nothing.
        alone: for attacks: whether no other thread may attack any of the modules meanwhile. If not, two may that want
            the same modes (their random layers draw from one generator in turn).

    Raises RuntimeError where another thread's attack stands against it, and ValueError for tensors that ``torch.nn``
    has not initialised yet.
    """
    held = _Held(modules_of(model), alone)
    with at_the_end(held.end):
        with _lock:
            found = modes_of(held.modules)
            wanted = dict.fromkeys(found, training) if isinstance(training, bool) else training or found
            copied = {module for module in held.modules if copy_buffers and not (update_buffers and wanted.get(module))}
            held.look(found, freeze and isinstance(model, nn.Module), copied, seeds or {})
            held.refuse_clash(wanted, training is None)
            _under_way.append(held)
            held.change(wanted, seeds or {})
        yield


@contextmanager
def at_the_end(*steps: Callable[[], object]) -> Iterator[None]:
    """Runs all of these when the context ends, whatever one of them raises, and raises the first error then.

    A step that Ctrl-C stops runs again, so that it may run twice.
    """
    try:
        yield
    finally:
        try:
            _run_all(steps)
        except KeyboardInterrupt:
            _run_all(steps)  # it may have come before the first
            raise


def _run_all(steps: Iterable[Callable[[], object]]) -> None:
    left, first = list(steps), None  # type: list[Callable[[], object]], BaseException | None
    while left:
        try:
            while left:
                left[0]()
                del left[0]
        except KeyboardInterrupt as error:
            first = first or error
        except BaseException as error:
            first = first or error
            del left[0]
    if first is not None:
        raise first


class _Held:
    """One attack under way. found: by how it is put back, what was found in each place."""

    def __init__(self, modules: list[nn.Module], alone: bool | None) -> None:
        self.thread, self.modules, self.alone = get_ident(), modules, alone
        self.found: dict[Put, dict[Any, Any]] = {put: {} for put in _PUTS}

    def look(self, modes: Modes, freeze: bool, copied: set[nn.Module], seeds: Iterable[torch.Generator]) -> None:
        """Notes how everything is; raises where it cannot be used."""
        tensors: dict[Any, Any] = {}
        copied_before = {place for earlier in _under_way for place in earlier.found[_put_tensors]}
        trainable = self.found[_put_trainable]
        self.found[_put_mode] = {**modes}
        for module in self.modules:
            parameters, _ = _present(module, module._parameters), _present(module, module._buffers)
            if freeze:
                trainable |= {p: p.requires_grad for p in parameters.values() if p.is_leaf and not p.is_inference()}
            if module._buffers and module in copied:
                tensors[module, "_buffers"] = {**module._buffers}  # one that is None too, which the network may fill
            if (freeze or copied) and (
                any([parameter.is_inference() for parameter in parameters.values()])
                or (module, "_parameters") in copied_before  # copies of another attack, which may end before this one
            ):
                tensors[module, "_parameters"] = parameters
            if module._forward_pre_hooks:  # weight_norm, spectral_norm and prune keep a weight here
                tensors[module, "__dict__"] = {name: t for name, t in vars(module).items() if isinstance(t, Tensor)}
            if isinstance(module, DistributedDataParallel):
                flags = module.require_backward_grad_sync, module.require_forward_param_sync
                self.found[_put_sync][module] = flags
        self.found[_put_tensors] = tensors
        self.found[_put_state] = {generator: generator.get_state() for generator in seeds}
        self.found[_put_cached] = {"weights": set(parametrize._cache)} if parametrize._cache_enabled else {}

    def refuse_clash(self, wanted: Modes, as_found: bool) -> None:
        """Raises RuntimeError where the attack of another thread has these modules otherwise than wanted."""
        own = {module for held in _under_way if held.thread == self.thread for module in held.found[_put_mode]}
        for other in _under_way:
            if other.thread == self.thread or self.alone is None or other.alone is None:
                continue
            before = other.found[_put_mode]
            for module in before.keys() & wanted.keys():
                mode = before[module] if as_found and module not in own else wanted[module]
                if self.alone or other.alone or mode != module.training:
                    raise RuntimeError(
                        f"another thread attacks this {type(self.modules[0]).__name__} just now, in another mode, or "
                        "one of the two has update_buffers=True: let the threads take turns (a threading.Lock around "
                        "the attack), or give each its own copy of the model (copy.deepcopy)"
                    )

    def change(self, wanted: Modes, seeds: Mapping[torch.Generator, int | None]) -> None:
        for module, mode in wanted.items():
            _put_mode(module, mode)
        for parameter in self.found[_put_trainable]:
            _put_trainable(parameter, False)
        places = {place: tensors for place, tensors in self.found[_put_tensors].items() if place[1] != "__dict__"}
        fresh = copies_of(tensor for tensors in places.values() for tensor in tensors.values() if tensor is not None)
        copies: dict[int, Tensor] = {}  # what two modules share stays shared
        for (module, store), tensors in places.items():
            present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            for tensor in present.values():
                if id(tensor) not in copies:
                    copy = fresh[id(tensor)]
                    copies[id(tensor)] = copy if store == "_buffers" else nn.Parameter(copy, requires_grad=False)
            _put_tensors((module, store), {name: copies[id(tensor)] for name, tensor in present.items()})
        for module in self.found[_put_sync]:
            _put_sync(module, (False, False))  # its reducer would wait for a backward to the weights, and other ranks
        for generator, seed in seeds.items():
            if seed is not None:
                generator.manual_seed(seed)

    def end(self) -> None:
        """Puts all back and leaves, under one lock: to one that has put its own back already, an earlier one that ends
        must not leave what it found."""
        with _lock:
            if self in _under_way:
                puts = [partial(self._put_back, put) for put in _PUTS]
                _run_all([*puts, torch.clear_autocast_cache, self._leave])

    def _put_back(self, put: Put) -> None:
        errors = []
        later = _under_way[_under_way.index(self) + 1 :]
        for place, value in self.found[put].items():
            heir = next((other for other in later if place in other.found[put]), None) if later else None
            try:
                if heir is None:
                    put(place, value)
                else:
                    heir.found[put][place] = value
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _leave(self) -> None:
        if self in _under_way:
            _under_way.remove(self)


def copies_of(tensors: Iterable[Tensor], together: Callable[[Tensor], bool] = lambda t: t.is_cuda) -> dict[int, Tensor]:
    """Copies by the ids of what they are of. Those on a GPU are made together: one by one, the statistics of many
    BatchNorm layers take more launches than a convolution of each."""
    copies: dict[int, Tensor] = {}
    groups: dict[Any, dict[int, Tensor]] = {}
    for t in tensors:
        if type(t) is Tensor and together(t):
            groups.setdefault((t.device, t.dtype, t.layout), {})[id(t)] = t
        else:
            copies[id(t)] = t.detach().clone()
    with torch.no_grad():
        for group in groups.values():
            made = [torch.empty_like(t) for t in group.values()]
            torch._foreach_copy_(made, list(group.values()))
            copies |= dict(zip(group, made, strict=True))
    return copies


def modes_of(modules: Iterable[nn.Module]) -> dict[nn.Module, bool]:
    """Of each module its mode, if it has one: a frozen script has none."""
    return {module: module.training for module in modules if hasattr(module, "training")}


def _put_mode(module: nn.Module, training: bool) -> None:
    if module.training == training:
        return
    kind, plain = type(module), vars(module)
    if kind.__setattr__ is nn.Module.__setattr__ and "training" in plain and not hasattr(kind, "training"):
        plain["training"] = training  # what __setattr__ comes to in the end, in a tenth of the time
    else:
        module.training = training


def _put_trainable(parameter: Tensor, requires_grad: bool) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)


def _put_tensors(place: tuple[nn.Module, str], tensors: Mapping[str, Tensor]) -> None:
    module, store = place
    for name, tensor in tensors.items():
        if store == "_parameters":
            setattr(module, name, tensor)  # an RNN keeps them in a list besides
        else:
            getattr(module, store)[name] = tensor


def _put_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _put_sync(module: Any, flags: tuple[bool, bool]) -> None:
    module.require_backward_grad_sync, module.require_forward_param_sync = flags


def _put_cached(_: str, keys: set[Any]) -> None:
    """Of ``parametrize.cached()``: a weight that was made without a graph must not be served to a training forward."""
    for key in parametrize._cache.keys() - keys:
        del parametrize._cache[key]


#: In the order in which things are put back: modes first.
_PUTS: tuple[Put, ...] = (_put_mode, _put_trainable, _put_tensors, _put_sync, _put_state, _put_cached)


def _present(module: nn.Module, kept: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What is not None. Raises ValueError for what is not initialised yet."""
    tensors = {name: tensor for name, tensor in kept.items() if tensor is not None}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(
                f"{name!r} of a {type(module).__name__} in the model is not initialised yet: run the model once "
                "before the attack, on a batch of the shape that it will see"
            )
    return tensors


def generators(indices: Iterable[int] = ()) -> list[torch.Generator]:
    """The global random generators of the CPU and of these CUDA devices."""
    return [torch.default_generator, *(torch.cuda.default_generators[index] for index in sorted(indices))]


def modules_of(model: object) -> list[nn.Module]:
    """All modules of a module, or of those that a function calls as far as they can be found: what it is bound to, its
    closure and defaults, the globals that it names, the attributes of a callable object."""
    if isinstance(model, nn.Module):
        return list(model.modules())
    found: dict[nn.Module, None] = {}
    left, seen = [model], set()
    while left:
        thing = left.pop()
        if isinstance(thing, nn.Module):
            found |= dict.fromkeys(thing.modules())
        elif id(thing) not in seen:
            seen.add(id(thing))
            left += _parts(thing)
    return list(found)


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, (list, tuple)):
        return list(thing)
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        known = thing.__globals__
        named = [known[name] for name in _names(thing.__code__) if name in known]
        own = [g for g in named if isinstance(g, nn.Module) or getattr(g, "__globals__", None) is known]
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        return [*own, *cells, *(thing.__defaults__ or ()), *vars(thing).values()]
    holds = callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__")
    return list(vars(thing).values()) if holds else []


def _names(code: CodeType) -> list[str]:
    """The names in a function's code, that of functions inside it too."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *(name for names in inner for name in names)]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (it raises where the variable has no value yet)
    except ValueError:
        return False
    return True


def _after_fork() -> None:
    """In a forked child the other threads are gone, with what they held."""
    global _lock
    _lock = RLock()
    for held in [held for held in _under_way if held.thread != get_ident()]:
        held.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
