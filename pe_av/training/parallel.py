"""DDP, FSDP, activation checkpointing and compilation, applied from outside: the model knows nothing of them.

The logit scales and biases stay out of DDP and FSDP: they are used in the loss and not in the embedder's forward, and
the loss already gives every rank their whole gradient (pe_av/loss.py).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pe_av.config import ConfigError, ParallelConfig
from pe_av.ranks import rank, world_size


def parallelize(model: nn.Module, embedder: nn.Module, config: ParallelConfig, device: torch.device) -> nn.Module:
    """Apply activation checkpointing, compilation and sharding to every block, then DDP or FSDP2 to the whole.

    Args:
        model: `PEAudioVideo` or `PEAudioFrame`, on the device; with FSDP, on the meta device on ranks other than 0.
        embedder: calls the model; all trained parameters but the logit scales and biases are used in its forward.
    Returns:
        the embedder, wrapped if DDP is used. Its parameters are still the model's, with rank 0's values on all ranks.
    Raises:
        ConfigError: there is nothing to compile with.
    """
    if config.compile:
        if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise ConfigError("parallel.compile=true needs a C++ compiler on a CPU: install g++, or leave it out")
        # a compiled block serves every length, but is compiled again with and without a mask, with and without
        # gradients, in training and evaluation, and for each width that the towers have: more often than the limit of 8
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in model.blocks():
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            block.compile(dynamic=True)
    if not dist.is_initialized():  # a single rank that torchrun started shows how its strategy will do with many
        return embedder
    if config.strategy == "fsdp":
        return _with_fsdp(model, embedder, config, device)
    return _with_ddp(model, embedder, device)


def _with_fsdp(model: nn.Module, embedder: nn.Module, config: ParallelConfig, device: torch.device) -> nn.Module:
    """The embedder, sharded in place."""
    weights = {name: value.cpu().clone() for name, value in model.state_dict().items()} if rank() == 0 else {}
    mesh = _mesh(config, device)
    # inputs are not cast: rotary angles in bfloat16 would mean other positions; autocast casts what may be cast
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.shard_bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    video = getattr(model, "video", None)  # PEAudioFrame has none
    if video is not None:
        video.patches_at_a_time = None
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # resharded after the forward, which is not FSDP's default for the outermost module: averaged weights and states are
    # made of shards, so between two calls every parameter must be one
    logits = set(model.logits.parameters())
    fully_shard(embedder, mesh=mesh, mp_policy=policy, ignored_params=logits, reshard_after_forward=True)
    if rank():
        embedder.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    return embedder


def _with_ddp(model: nn.Module, embedder: nn.Module, device: torch.device) -> nn.Module:
    """The embedder, wrapped."""
    embedder, logits = _Anchored(embedder), set(model.logits.parameters())
    ignored = [name for name, parameter in embedder.named_parameters() if parameter in logits]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(embedder, ignored)
    return DistributedDataParallel(
        embedder,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,  # for instance the audio tower in a batch without audio
        gradient_as_bucket_view=True,
    )


class _Anchored(nn.Module):
    """The embedder, with a parameter of no effect in every embedding that has no trained one. DDP needs a backward pass
    after every forward, even if a batch runs through frozen parts only."""

    def __init__(self, embedder: nn.Module):
        super().__init__()
        self.embedder = embedder
        device = next(embedder.parameters()).device
        self.anchor = nn.Parameter(torch.zeros((), device=device))

    def forward(self, micro_batch: dict[str, Any]) -> dict[str, Tensor]:
        embeds = self.embedder(micro_batch)
        if not torch.is_grad_enabled():
            return embeds
        return {name: value if value.requires_grad else value + 0 * self.anchor for name, value in embeds.items()}


def share_weights(module: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's weights of a module that is needed before `parallelize`."""
    if world_size() == 1:
        return
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device=device)
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)


def _mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """(ranks,), or with `shard_size` (replicas, shards): the ranks of one replica hold the model once among them."""
    if config.shard_size is None:
        return init_device_mesh(device.type, (world_size(),))
    if world_size() % config.shard_size:
        raise ConfigError(
            f"parallel.shard_size={config.shard_size} does not divide {world_size()} ranks; a node's GPUs are usual"
        )
    shape = (world_size() // config.shard_size, config.shard_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def gradients_stay_local(embedder: nn.Module, local: bool) -> Iterator[None]:
    """Inside, if `local`, DDP does not average gradients over the ranks: it does so in the last micro-batch only. FSDP
    always does, since otherwise every rank would have to hold the whole gradient."""
    with embedder.no_sync() if local and isinstance(embedder, DistributedDataParallel) else nullcontext():
        yield


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], norm: float) -> Tensor:
    """Scale all gradients, whole or sharded, so that their global norm is at most `norm`; returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    device = parameters[0].device
    squares = {False: torch.zeros((), device=device), True: torch.zeros((), device=device)}
    for sharded in squares:
        local = [local_part(g) for g in gradients if isinstance(g, DTensor) == sharded]
        if local:
            squares[sharded] = torch.stack(torch._foreach_norm(local)).float().square().sum()
    mesh = next((g.device_mesh for g in gradients if isinstance(g, DTensor)), None)
    if mesh is not None:
        # summed over the shards of one replica: the replicas hold the same
        dist.all_reduce(squares[True], group=mesh.get_group(mesh.ndim - 1))
    total = (squares[False] + squares[True]).sqrt()
    factor = (norm / (total + 1e-6)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_([local_part(g) for g in gradients], factor)
    return total


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
