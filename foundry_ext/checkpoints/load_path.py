"""`load_path`: a checkpoint that may be from anywhere, looked at before Composer unpickles it."""

from pathlib import Path

from composer.utils import parse_uri

from foundry_ext.checkpoints.files import damage
from foundry_ext.checkpoints.safe_load import load_checkpoint
from foundry_ext.utils.errors import UserError


def check_load_path(name: str, *, thoroughly: bool = True) -> None:
    """Reads the file as Composer would, but so that nothing in it can run.

    A folder is one of FSDP's sharded checkpoints, which are not looked into.

    Args:
        name: with the rank's number and the run's name in it.
        thoroughly: reads it to its end.

    Raises:
        UserError: it cannot be looked at here, is spoilt, or could run code.
    """
    if parse_uri(name)[0]:
        raise UserError(
            f"load_path: {name} is unpickled as it comes, and could run code; download it, and name"
            " the file"
        )
    path = Path(name)
    if path.is_dir() or not path.exists():  # the latter is Composer's to say
        return
    if path.suffix != ".pt":
        raise UserError(
            f"load_path: {path} is no .pt file, and others are not looked into before they are"
            " unpickled, which could run code; decompress it, or name it .pt if it is one"
        )
    problem = damage(path) if thoroughly else None
    if problem:
        raise UserError(f"load_path: {path} {problem}; name another checkpoint")
    try:
        load_checkpoint(path, mmap=True)
    except ValueError as error:
        raise UserError(f"load_path: {error}") from error
