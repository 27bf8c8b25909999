"""Everything that makes many processes train one model, applied from outside: the model knows nothing of it.

The logit scales and biases stay out of DDP and FSDP: they are used in the loss and not in the model's forward, and the
loss already gives every rank their whole gradient (pe_av/loss.py).
"""

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
    """Recomputation, compilation and sharding per block, then DDP or FSDP2 around the whole.

    Args:
        model: `PEAudioVideo` or `PEAudioFrame`, on the device.
        embedder: calls the model; what is trained runs inside its forward, but for the logit scales and biases.
    Returns:
        the embedder, possibly inside DDP; its parameters are those of the model. Their values are rank 0's: under FSDP
        the other ranks may come with a model on the meta device.
    """
    if config.compile:
        # one compiled block serves every length; the few variants left are: with and without mask, with and without
        # gradients, training or not, for each width that a tower has
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in model.blocks():
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            block.compile(dynamic=True)
    if world_size() == 1:
        return embedder
    outside = set(model.logits.parameters())
    if config.strategy == "fsdp":
        whole = {name: value.cpu().clone() for name, value in model.state_dict().items()} if rank() == 0 else {}
        mesh = _mesh(config, device)
        # inputs stay as they are: rotary angles in bfloat16 would be other positions; autocast casts what may be cast
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.shard_bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in model.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # resharded after the forward too, so that between two calls every parameter is a shard: the average of the
        # weights and the saved state are made of shards
        fully_shard(embedder, mesh=mesh, mp_policy=policy, ignored_params=outside, reshard_after_forward=True)
        if rank():
            embedder.to_empty(device=device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole, options=options)
        return embedder
    embedder = _Anchored(embedder)
    ignored = [name for name, parameter in embedder.named_parameters() if parameter in outside]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(embedder, ignored)
    return DistributedDataParallel(
        embedder,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,  # batches without sound, say, leave the parameters of its tower alone
        gradient_as_bucket_view=True,
    )


class _Anchored(nn.Module):
    """The embedder with a parameter of no effect in everything that has no other: DDP must see a backward pass after
    every forward, also of a batch of which only frozen parts are run."""

    def __init__(self, embedder: nn.Module):
        super().__init__()
        self.embedder = embedder
        device = next(embedder.parameters()).device
        self.anchor = nn.Parameter(torch.zeros((), device=device))

    def forward(self, part: dict[str, Any]) -> dict[str, Tensor]:
        found = self.embedder(part)
        if not torch.is_grad_enabled():
            return found
        return {name: v if v.requires_grad else v + 0 * self.anchor for name, v in found.items()}


def share_weights(module: nn.Module, device: torch.device) -> None:
    """Rank 0's weights of a part that every rank needs before the model is spread over them."""
    if world_size() == 1:
        return
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device=device)
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)


def _mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """All ranks in a row; with `shard_size`, rows of so many, each of which holds the whole model once."""
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
    """DDP averages the gradients over the ranks in the last micro-batch only. FSDP always does, since otherwise every
    rank would have to hold the whole gradient."""
    with embedder.no_sync() if local and isinstance(embedder, DistributedDataParallel) else nullcontext():
        yield


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], norm: float) -> Tensor:
    """Scale all gradients down to the global `norm`, whole or sharded; returns what it was before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    device = parameters[0].device
    squares = {False: torch.zeros((), device=device), True: torch.zeros((), device=device)}
    for sharded in squares:
        local = [local_part(g) for g in gradients if isinstance(g, DTensor) == sharded]
        if local:
            squares[sharded] = torch.stack(torch._foreach_norm(local)).float().square().sum()
    mesh = next((g.device_mesh for g in gradients if isinstance(g, DTensor)), None)
    if mesh is not None:
        # replicas hold the same shards: only the ranks that share one model's shards add up
        dist.all_reduce(squares[True], group=mesh.get_group(mesh.ndim - 1))
    total = (squares[False] + squares[True]).sqrt()
    factor = (norm / (total + 1e-6)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_([local_part(g) for g in gradients], factor)
    return total


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
