"""Safety check of `load_path`: any file may be named, and Composer unpickles it."""

from pathlib import Path

from composer.utils import dist, parse_uri

from foundry_ext.checkpoints.files import damage, foreign_content
from foundry_ext.checkpoints.safe_load import load_checkpoint
from foundry_ext.utils.errors import UserError


def check_is_seen(name: str) -> None:
    """Check that the checkpoint that rank 0 has chosen is on this node's disk too.

    Raises:
        UserError: it is not.
    """
    if not Path(name).exists():
        raise UserError(
            f"save_folder: node {dist.get_node_rank()} does not see {name}; use a shared folder, or"
            " copy it there"
        )


def check_load_path(name: str, *, thoroughly: bool = True) -> None:
    """Check that Composer can read the checkpoint, and that nothing in it can run.

    A folder is a sharded FSDP checkpoint, whose files are not checked. `name` has the rank's number
    and the run's name filled in. Checking `thoroughly` reads the file to its end.

    Raises:
        UserError: the file cannot be checked here, is corrupted, or could run code.
    """
    if parse_uri(name)[0]:
        raise UserError(
            f"load_path: {name} would be unpickled unchecked, which could run code; download it and"
            " give the file's path"
        )
    path = Path(name)
    if path.is_dir() or not path.exists():  # Composer reports a missing file
        return
    if path.suffix != ".pt":
        raise UserError(
            f"load_path: {path} must be a .pt file, because others are unpickled unchecked, which"
            " could run code; decompress it, or rename it to .pt if it is one"
        )
    try:
        problem = damage(path) if thoroughly else foreign_content(path)
    except OSError as error:
        raise UserError(
            f"load_path: {path} cannot be read ({error.strerror or error}); make it readable, or"
            " name another checkpoint"
        ) from error
    if problem:
        raise UserError(f"load_path: {path} {problem}; name another checkpoint")
    try:
        load_checkpoint(path, mmap=True)
    except ValueError as error:
        raise UserError(f"load_path: {error}") from error
