"""The processes that share one job: how they find each other, and the small messages between them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pe_av.config import ConfigError


@contextmanager
def process_group(device: torch.device, timeout_minutes: float) -> Iterator[torch.device]:
    """Join the process group that the environment describes, if it describes one; yields the device of this rank.

    Raises:
        ConfigError: the description is incomplete, or there is no GPU for this rank.
        ConnectionError: another rank ended, or did not answer for `timeout_minutes`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and "MASTER_ADDR" not in os.environ:
        yield device
        return
    unset = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise ConfigError(
            f"{', '.join(unset)} not set: start with torchrun, which sets the variables by which ranks find each "
            "other, or set them as in docs/slurm.md"
        )
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"there is no GPU for rank {local} of this machine, where this process sees "
                f"{torch.cuda.device_count()}: start at most one rank per GPU, and under Slurm ask for "
                "--gpus-per-node instead of --gpus-per-task"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank_, world = next(dist.rendezvous("env://", timeout=timeout))
    # when torchrun restarts the ranks it keeps its store, which still has the addresses of the ranks that are gone
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # small messages, such as the number of rows of each rank, go over gloo and never wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank_, world_size=world, timeout=timeout)
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        # the process group is not destroyed here, because that would wait for the lost rank
        raise ConnectionError(
            f"rank {rank()} lost another one, which ended or hangs ({reason}): the message of that rank says why; "
            "resume=auto goes on from the newest state, and torchrun --max-restarts=3 restarts by itself"
        ) from error
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def of_all_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in order, on every rank. They travel by pickle between the hosts, not the GPUs."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def of_rank_0(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]
