"""The folder in which one run saves: what a start finds there, and when it may tidy up."""

import logging
from pathlib import Path

from foundry_ext.checkpoints import files
from foundry_ext.checkpoints.folder_lock import FolderLock
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)


class RunFolder:
    """A run's checkpoints, of which a start chooses one, and which it puts in order later.

    Args:
        folder: the folder. Those below are of other runs, unless `template` has one.
        template: the names of the checkpoints, such as "ep{epoch}-ba{batch}.pt".
        latest: the link to the newest checkpoint.
    """

    def __init__(self, folder: Path, template: str, latest: Path):
        self.folder, self.template, self.latest = folder, template, latest
        self.lock = FolderLock(folder)
        self._chosen: Path | None = None
        self._damaged: dict[Path, str] = {}
        self._is_in_order = False

    def choose(self, *, overwrite: bool, load_path: str | None) -> list[Path]:
        """Return the checkpoints up to the newest intact one, oldest first; change no file.

        Args:
            overwrite: whether the run may overwrite an earlier one's checkpoints.
            load_path: the checkpoint that a new run starts from, which may lie in the folder.

        Raises:
            UserError: there are checkpoints, but none has such a name or is intact.
        """
        paths = files.find_checkpoints(self.folder, self.template)
        if overwrite and self.latest.exists():
            # Later ones may be left from an earlier run that this one overwrites.
            resolved = [path.resolve() for path in paths]
            if self.latest.resolve() in resolved:
                paths = paths[: resolved.index(self.latest.resolve()) + 1]
        given = Path(load_path) if load_path else None
        if not (paths or overwrite) and files.has_any(self.folder, self.template, besides=given):
            raise UserError(
                f"{self.folder}: there are checkpoints, but none is named like save_filename,"
                f" {self.template}, or those are links, so the run would start from the beginning;"
                " restore them, or give the new run another folder"
            )
        for link in files.links_named_like(self.folder, self.template):
            log.warning("%s is a link, which this run did not save: passed over", link)
        intact, self._damaged = files.newest_intact(paths)
        self._chosen = intact[-1] if intact else None
        return intact

    def put_in_order(self) -> None:
        """Remove what a killed process left, set damaged checkpoints aside, correct the link.

        To be called once the run's first step has ended: until then a start may be refused, and
        must leave everything as it was.
        """
        if self._is_in_order:
            return
        self._is_in_order = True
        self.lock.sign()
        files.remove_partial(self.folder, self.template, str(self.latest))
        if self._chosen is not None:
            files.set_aside(self._damaged, intact=self._chosen)
            if self.latest.resolve() != self._chosen.resolve():
                files.link_to(self._chosen, self.latest)
