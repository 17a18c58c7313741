"""Processes: one without a launcher, or many under torchrun, the DeepSpeed launcher or SLURM, on CPU or GPU.

`init_distributed` reads who we are from the environment, starts DeepSpeed's communication (gloo on CPU, NCCL
on GPU) and returns a `World`. On the CPU DeepSpeed's shared-memory operator is switched off first: it would
need a C++ compiler and ninja at run time. All helpers work unchanged in a single process.
"""

import datetime
import logging
import os
import re
import socket
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)
TIMEOUT = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """Who this process is: `rank` of `size`, `local_rank` on its machine, and the device it computes on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True in the one process that writes shared files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes, in float64, equal on all of them."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag: is it set in any process?"""
        return [value > 0 for value in self.sum([float(flag) for flag in flags])]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in rank order, on all of them (plain Python objects)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def choose_device(wanted: str = "auto") -> str:
    """`cuda` or `cpu` for `auto`, `cuda` or `cpu`; `DS_ACCELERATOR` decides for auto where it is set.

    Raises:
        ValueError: cuda is wanted and there is no usable GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu, or check the driver and torch")
    if wanted != "auto":
        return wanted
    named = os.environ.get("DS_ACCELERATOR", "")
    return "cuda" if torch.cuda.is_available() and named in ("", "cuda") else "cpu"


def read_environment(environ: dict[str, str] | None = None) -> dict[str, str]:
    """The launcher's rank variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) as strings.

    torchrun and the DeepSpeed launcher set them; under `srun` they are derived from SLURM's; without a
    launcher they describe a single process.
    """
    env = dict(os.environ if environ is None else environ)
    if "RANK" in env and "WORLD_SIZE" in env:
        found = {
            "RANK": env["RANK"],
            "WORLD_SIZE": env["WORLD_SIZE"],
            "LOCAL_RANK": env.get("LOCAL_RANK", "0"),
        }
        found["MASTER_ADDR"] = env.get("MASTER_ADDR", "127.0.0.1")
        found["MASTER_PORT"] = env.get("MASTER_PORT") or (
            "29500" if env["WORLD_SIZE"] != "1" else free_port()
        )
        return found
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        job = int(re.sub(r"\D", "", env.get("SLURM_JOB_ID", "0")) or 0)
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": env.get("MASTER_ADDR", first_slurm_host(nodes)),
            "MASTER_PORT": env.get("MASTER_PORT", str(20000 + job % 20000)),
        }
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return {**single, "MASTER_PORT": free_port()}


def place_process(
    process_num: int = 0, world_size: int = 1, local_rank: int = 0, device: str = "auto"
) -> tuple[int, int, str]:
    """(rank, number of processes, device) of a process that works on its own share without talking to others.

    Args:
        process_num, world_size, local_rank: flags, for processes started by hand; a launcher's variables win.
        device: `auto`, `cuda`, `cpu`, or a device with its number (`cuda:1`).

    Raises:
        ValueError: launcher and flags disagree, or there is no such device.
    """
    environment = read_environment()
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if size == 1:
        rank, size, local_rank = process_num, world_size, local_rank or process_num
    elif world_size not in (1, size):
        raise ValueError(
            f"the launcher started {size} processes, --world_size is {world_size}; drop the flag"
        )
    else:
        local_rank = int(environment["LOCAL_RANK"])
    device = device if ":" in device else choose_device(device)
    if device == "cuda":
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
    return rank, size, device


def first_slurm_host(nodes: str) -> str:
    """First host of a SLURM node list: `gpu[003-006,9],login` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\](.*?)(?:,|$))?", nodes)
    if match is None:
        raise ValueError(f"cannot read a host from the SLURM node list {nodes!r}; set MASTER_ADDR")
    return match.group(1) + (match.group(2) or "") + (match.group(3) or "")


def free_port() -> str:
    """A port that is free on this machine just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def init_distributed(device: str = "auto") -> World:
    """Start DeepSpeed's communication for this process and return its `World`.

    Args:
        device: `auto`, `cuda` or `cpu`.

    Raises:
        ValueError: cuda is wanted and there is no usable GPU.
    """
    kind = choose_device(device)
    os.environ["DS_ACCELERATOR"] = kind
    env = read_environment()
    os.environ.update(env)
    rank, size, local_rank = (int(env[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    deepspeed = import_deepspeed()
    where = torch.device("cpu")
    if kind == "cuda":
        where = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    elif rank == 0 and device == "auto":
        logger.warning("no GPU is used: training runs on the CPU (%d process(es))", size)
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=TIMEOUT,
            rank=rank,
            world_size=size,
        )
    return World(rank, size, local_rank, where)


def import_deepspeed() -> Any:
    """The deepspeed package, quiet, and on the CPU without its compiled shared-memory operator."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
