"""The device mesh of a job's ranks: dp_replicate × dp_shard × cp, named as in torchtitan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ictx.errors import UserError
from ictx.parallel.context import Context


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's axes; ranks of the last axis are neighbours. Default: all ranks shard."""

    dp_replicate: int = 1
    """Replicas of the sharded weights (HSDP): one per node if the network between nodes is slow."""
    dp_shard: int = -1
    """Ranks that shard weights, besides those of `cp`; -1: all remaining ranks."""
    cp: int = 1
    """Context parallel ranks that split each window's tokens; they also shard weights."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError(f"dp_shard is {self.dp_shard}: expected 1 or more, or -1 for all remaining ranks")

    def of(self, ranks: int) -> Layout:
        """Returns the layout with `dp_shard` resolved. Raises UserError if the product is not the number of ranks."""
        others = self.dp_replicate * self.cp
        found = replace(self, dp_shard=max(ranks // others, 1)) if self.dp_shard == -1 else self
        product = others * found.dp_shard
        if product != ranks:
            shard = "ranks / (dp_replicate × cp)" if self.dp_shard == -1 else str(self.dp_shard)
            raise UserError(
                f"parallel: dp_replicate {self.dp_replicate} × dp_shard {shard} × cp {self.cp} does not make "
                f"{ranks} ranks: change these settings, or start {product} ranks"
            )
        return found

    def check_model(self, heads: int, tokens: int) -> None:
        """Raises ValueError unless `cp` divides a model's attention heads and a window's tokens."""
        for name, value in {"model.num_attention_heads": heads, "train.sequence_length": tokens}.items():
            if value % self.cp:
                raise ValueError(f"parallel.cp is {self.cp}: expected to divide {name}, {value}")

    def sharding(self, device: str) -> DeviceMesh:
        """Returns the mesh for sharding, and for replication with HSDP; every rank calls it."""
        shards = self.dp_shard * self.cp
        if self.dp_replicate == 1:
            return init_device_mesh(device, (shards,), mesh_dim_names=("dp_shard_cp",))
        return init_device_mesh(device, (self.dp_replicate, shards), mesh_dim_names=("dp_replicate", "dp_shard_cp"))

    def context(self, device: str) -> Context | None:
        """Returns this rank's context parallel group; None without context parallelism."""
        if self.cp == 1:
            return None
        mesh = init_device_mesh(device, (self.dp_replicate * self.dp_shard, self.cp), mesh_dim_names=("dp", "cp"))
        return Context.of(mesh["cp"].get_group())
