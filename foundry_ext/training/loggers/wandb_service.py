"""W&B's key, and its service: the process to which the package wandb sends everything."""

import subprocess
import time
from collections.abc import Mapping
from typing import Any


def lacks_key(init_kwargs: Mapping[str, Any]) -> bool:
    """Return whether W&B would ask for a key, given the arguments of `wandb.init`."""
    import wandb
    from wandb.sdk.lib import apikey

    setup: Any = wandb.setup()
    settings = setup.settings
    mode = init_kwargs.get("mode") or settings.mode or "online"
    anonymous = init_kwargs.get("anonymous") or settings.anonymous or "never"
    given = (init_kwargs.get("settings") or {}).get("api_key")
    if mode != "online" or anonymous in ("allow", "must") or given:
        return False
    return apikey.api_key(settings) is None


def service_process() -> "subprocess.Popen[bytes] | None":
    """Return the service, or None if there is none or another process has started it.

    The package has no public name for it.
    """
    from wandb.sdk.wandb_setup import _WandbSetup

    session: Any = _WandbSetup._instance
    connection = getattr(session, "_connection", None)
    return getattr(getattr(connection, "_proc", None), "_internal_proc", None)


def has_ended(service: "subprocess.Popen[bytes] | None") -> bool:
    """Return whether a service has ended; one that was killed gets a moment for it."""
    if service is None:
        return False
    try:
        service.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return False
    return True


def write_out() -> None:
    """Make the service write what it holds of the run's file.

    It writes blocks of 32 KB, so what it holds is lost with it. Blanks in the run's output fill the
    last block.
    """
    import wandb

    try:
        backend: Any = wandb.run and wandb.run._backend
        backend.interface.publish_output_raw("stdout", " " * 2**16)
    except Exception:
        return
    time.sleep(1)


def leave(exit_code: int) -> bool:
    """Finish W&B's run, if there is one, and end its service; return whether W&B did so."""
    import wandb
    from wandb.sdk.lib import module

    try:
        wandb.finish(exit_code)
        finished = True
    except Exception:
        finished = False
        module.unset_globals()  # else the next wandb.init would return this run
    return end_service(exit_code) and finished


def end_service(exit_code: int) -> bool:
    """End W&B's service and remove its exit hook; return whether W&B did so.

    A service of another process is left alone.
    """
    import wandb

    try:
        wandb.teardown(exit_code)
    # With a service that has died. W&B calls sys.exit with the service's own exit code.
    except (Exception, SystemExit) as error:
        return type(error).__name__ == "WandbServiceNotOwnedError"
    return True
