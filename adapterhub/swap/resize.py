"""Pool and arena of another size, while requests run: what stays is copied to where it lies from then on, and its holds
find it there. Only the engine's thread may call this, and only while nothing is on its way."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

import torch

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.allocator import ALIGNMENT, aligned
from adapterhub.swap.contents import Contents
from adapterhub.swap.memory import available_bytes

log = logging.getLogger(__name__)


def set_budgets(contents: Contents, device: int | None, ram: int | None) -> None:
    """Another pool, or arena, takes the place of the one that is there, beside which it is filled. Where a device has
    no room for two pools, what is in the one waits in host memory meanwhile.

    Raises BadRequest when there is no memory for that, or what must stay would not fit: then nothing changes, unless
    others took the device's memory meanwhile.
    """
    contents.plan(None, device, ram)
    arena = None if ram is None else contents.host.prepared(ram)
    if device is not None:
        _set_device(contents, device)
    if arena is not None:
        contents.change(None, ram)
        contents.host.move_to(arena)


def give_back(contents: Contents, nbytes: int) -> int:
    """Makes the pool smaller by `nbytes`, or by what can be given; how many bytes that were.

    What is in use or pinned stays, and the largest that ever came still fits beside the pins. Two pools are never there
    at once: what stays waits in host memory. Raises torch.OutOfMemoryError, and the pool is lost, when others have
    taken what was given back before even that had its place again.
    """
    before = contents.pool.capacity
    least = contents.least_bytes
    wanted = max((before - nbytes) // ALIGNMENT * ALIGNMENT, least)
    if wanted >= before or not _rebuild(contents, [wanted, aligned((wanted + least) // 2), least]):
        return 0
    return before - contents.pool.capacity


def _set_device(contents: Contents, capacity: int) -> None:
    before = contents.pool.capacity
    try:
        memory = _second_pool(contents, capacity)
    except torch.OutOfMemoryError as error:
        sizes = [capacity, before] if capacity > before else [capacity]
        built = _rebuild(contents, [*sizes, min(contents.least_bytes, capacity)])
        if not built or contents.pool.capacity < capacity // ALIGNMENT * ALIGNMENT:
            raise _no_room(capacity, f"not so much memory ({error})") from error
        return
    sources = {digest: contents.extent(resident) for digest, resident in contents.residents.items()}
    contents.change(capacity, None)
    targets = {digest: contents.extent(resident) for digest, resident in contents.residents.items()}
    contents.pool.adopt(memory, [(sources[digest], extent) for digest, extent in targets.items()])
    for resident in contents.residents.values():
        contents.replace(resident)


def _second_pool(contents: Contents, capacity: int) -> torch.Tensor:
    memory = contents.pool.memory(capacity)
    if contents.pool.device.type == "cpu":  # its pages are taken as blocks come, and only then would it show
        gone = sum(size for _, size in contents.plan(None, capacity, None).device)
        needed, available = contents.residency.allocator.used_bytes - gone, available_bytes()
        if available is not None and needed > available:
            raise _no_room(
                capacity,
                f"{format_bytes(available)} of memory left, and the blocks that stay need {format_bytes(needed)}",
            )
    return memory


def _rebuild(contents: Contents, sizes: list[int]) -> bool:
    """The pool gives all of its memory back, and takes the first of these sizes that can be had; each but the first
    holds what the first does, or is smaller. False, and nothing changes, when host memory has no room meanwhile.

    Raises torch.OutOfMemoryError when not even the last is to be had.
    """
    now, pool = time.monotonic(), contents.pool
    gone = {digest for digest, _ in contents.plan(None, sizes[0], None, now).device}
    stay = contents.residents.keys() - gone
    needed = sum(contents.residents[digest].nbytes for digest in stay if digest not in contents.host)
    available = available_bytes()
    if available is not None and needed > available:
        log.warning(
            "The device pool stays as it is: %s would have to wait in host memory, which has %s left.",
            format_bytes(needed),
            format_bytes(available),
        )
        return False
    waiting = {digest: contents.in_host_memory(digest) for digest in stay}
    for digest, resident in contents.residents.items():
        resident.placed = resident.placed and resident.placed.moved(waiting[digest], 0) if digest in stay else None
    pool.let_go()
    pool.tensor = _first_to_be_had(contents, sizes)
    contents.change(pool.capacity, None, now)
    for digest, resident in contents.residents.items():
        pool.view(contents.extent(resident)).copy_(waiting[digest])
        contents.replace(resident)
    return True


def _first_to_be_had(contents: Contents, sizes: list[int]) -> torch.Tensor:
    for size in sizes[:-1]:
        with suppress(torch.OutOfMemoryError):
            return contents.pool.memory(size)
    return contents.pool.memory(sizes[-1])


def _no_room(device: int, why: str) -> BadRequest:
    return BadRequest(
        f"A pool of {format_bytes(device)} has to be filled beside the one that it replaces, and there is {why}. "
        "Choose less, or restart the server with the new budget."
    )
