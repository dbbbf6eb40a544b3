"""Prepared data as a loader uses it."""

from dataclasses import dataclass

from foundry_ext.data.prepared.cuts import Cuts, cut_rows
from foundry_ext.data.prepared.index import PreparedIndex
from foundry_ext.data.prepared.local_shards import LocalShards
from foundry_ext.utils.errors import UserError


@dataclass(frozen=True, eq=False)
class PreparedSource:
    """Prepared data, and how it is used."""

    index: PreparedIndex
    files: LocalShards
    max_seq_len: int
    overlong: str
    passes: float = 1.0
    """Passes over the source in an epoch."""

    def check_overlong(self, name: str) -> None:
        """Check that the rows can be cut as `overlong` says.

        Raises:
            UserError: a row is too long under `error`, or rows with prompts are to be split.
        """
        if self.overlong == "split" and self.index.recipe.with_loss:
            raise UserError(
                f"{name}: overlong: split is for prepared plain text; set truncate or drop, or"
                " raise max_seq_len"
            )
        if self.overlong == "error":
            for shard in self.index.shards:
                if shard.longest > self.max_seq_len:
                    raise UserError(
                        f"{name}: {shard.piece}: a row has {shard.longest} tokens, more than"
                        f" max_seq_len {self.max_seq_len}; raise max_seq_len, or set overlong to"
                        " truncate, split or drop"
                    )

    def cuts(self, shard: int) -> Cuts:
        """Return the documents of a shard."""
        overlong = "truncate" if self.overlong == "error" else self.overlong
        return cut_rows(self.index.sizes(shard), self.max_seq_len, overlong)
