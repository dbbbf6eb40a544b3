"""Modal: trains in a container and continues in another one after a pre-emption or a timeout.

Parsed by Modal, not run: docs/how-to/rented-machines.md

    modal secret create wandb WANDB_API_KEY=...      # once; or WANDB_MODE=offline
    modal run --detach docs/how-to/rented/modal_train.py \
        --command "composer train.py yamls/smollm2_lora.yaml"
    modal volume get foundry-ext-outputs smollm2-135m_metamathqa_lora outputs/

Call it from the project's folder, which is copied with its data/. GPU=A100 before `modal run` asks
for another GPU, and GPU=H100:4 for four.
"""

import os
import shlex
import signal
import subprocess
import sys

import modal

PROJECT = "/root/foundry_ext"
NOT_COPIED = [".venv*", ".cache", "build", "dist", "outputs", "wandb", "**/__pycache__"]

image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("gcc", "git", "make")
    # The same packages as `make install`; a layer of their own, which a change of the code keeps.
    .pip_install_from_requirements("requirements.lock")
    .add_local_dir(".", PROJECT, copy=True, ignore=NOT_COPIED)
    .run_commands(f"pip install --no-deps --no-build-isolation -e {PROJECT}")
)
outputs = modal.Volume.from_name("foundry-ext-outputs", create_if_missing=True)
cache = modal.Volume.from_name("foundry-ext-cache", create_if_missing=True)
app = modal.App("foundry-ext")


@app.function(
    image=image,
    gpu=os.environ.get("GPU", "L4"),
    cpu=8.0,
    memory=32 * 1024,  # MiB
    volumes={f"{PROJECT}/outputs": outputs, "/root/.cache/huggingface": cache},
    secrets=[modal.Secret.from_name("wandb")],
    timeout=24 * 60 * 60,  # seconds; the longest that Modal allows
    retries=modal.Retries(max_retries=10, initial_delay=1.0, backoff_coefficient=1.0),
    single_use_containers=True,  # a retry begins in a fresh process
)
def train(command: str) -> int:
    """Run the command until it ends and return its exit code.

    Modal calls this again after an interruption. A run that fails is not repeated, because its exit
    code is returned and not raised.
    """
    child = subprocess.Popen(shlex.split(command), cwd=PROJECT, start_new_session=True)
    try:
        return child.wait()
    except BaseException:  # Ctrl-C's signal announces a pre-emption, 30 seconds before the kill
        child.send_signal(signal.SIGINT)  # the run saves at the end of its batch
        child.wait()
        raise
    finally:
        outputs.commit()  # Modal also does so every few seconds


@app.local_entrypoint()
def main(command: str = "composer train.py yamls/smollm2_lora.yaml") -> None:
    sys.exit(train.remote(command))
