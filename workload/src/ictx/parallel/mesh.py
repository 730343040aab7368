"""How the ranks of a job share out weights and windows: dp_replicate × dp_shard × cp, named as in torchtitan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ictx.errors import UserError
from ictx.parallel.context import Context


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis of the mesh, the last axis being neighbours; by default all of them shard."""

    dp_replicate: int = 1
    """Groups of ranks that each hold all weights (HSDP): a node each where the network between nodes is slow."""
    dp_shard: int = -1
    """Ranks among which weights are sharded, besides those of `cp`; -1: as many as there are."""
    cp: int = 1
    """Ranks that share out the tokens of each window (context parallelism); they shard weights too."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError(f"dp_shard is {self.dp_shard}: expected 1 or more, or -1 for as many as there are")

    def of(self, ranks: int) -> Layout:
        """Returns the layout of so many ranks, `dp_shard` computed. Raises UserError where the product is another."""
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
        """Returns the mesh that weights are sharded over, and replicated where that is wanted; for all ranks."""
        shards = self.dp_shard * self.cp
        if self.dp_replicate == 1:
            return init_device_mesh(device, (shards,), mesh_dim_names=("dp_shard_cp",))
        return init_device_mesh(device, (self.dp_replicate, shards), mesh_dim_names=("dp_replicate", "dp_shard_cp"))

    def context(self, device: str) -> Context | None:
        """Returns the ranks that share this one's windows; None where it has them for itself."""
        if self.cp == 1:
            return None
        mesh = init_device_mesh(device, (self.dp_replicate * self.dp_shard, self.cp), mesh_dim_names=("dp", "cp"))
        return Context.of(mesh["cp"].get_group())
