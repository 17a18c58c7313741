"""A toy model and data for engine tests, importable by forked and launched processes."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # noqa: F401  (the optimiser would import it in every process)
from torch import nn

from utils.engine_config import EngineConfig


class RunningScale(nn.Module):
    """A trained scale beside a running mean (a buffer that training changes)."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(hidden.detach().mean(0).to(self.mean.dtype), self.momentum)
        return (hidden - self.mean.to(hidden.dtype)) * self.weight


class ToyModel(nn.Module):
    """A frozen and a trained linear layer with dropout, a norm with running figures, and a decoder part."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 8).requires_grad_(False)
        self.body = nn.Linear(8, 8)
        self.norm = RunningScale(noise)
        self.dropout = nn.Dropout(noise)
        self.decoder = nn.Linear(8, 1)

    def forward(self, images: torch.Tensor, targets: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        hidden = self.dropout(self.norm(torch.tanh(self.body(self.frozen(images)))))
        loss = (self.decoder(hidden)[:, 0].float() - targets.float()).square().mean()
        return {"loss": loss, "half_loss": loss / 2, "features": hidden}


class ToyData:
    """Items drawn from (seed, epoch, index); `poison` is not a number, draw `deadly` sends a signal."""

    def __init__(
        self, poison: int | None = None, deadly: int | None = None, number: int = signal.SIGKILL
    ) -> None:
        self.length, self.poison, self.deadly, self.number, self.drawn = 20, poison, deadly, number, 0

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        """An input (6,) whose first entry says whether it is large."""
        self.drawn += 1
        if self.drawn == self.deadly:
            os.kill(os.getpid(), self.number)
        values = np.random.default_rng([seed, epoch, index]).normal(size=6).astype("float32")
        if index == self.poison:
            values[0] = np.nan
        return {"name": f"image-{index}.png", "values": values, "target": float(values[1:3].sum())}


def toy_collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch of the toy samples."""
    return {
        "image_paths": [sample["name"] for sample in samples],
        "images": torch.from_numpy(np.stack([sample["values"] for sample in samples])),
        "targets": torch.tensor([sample["target"] for sample in samples]),
        "dropped": sum(sample["name"] == "image-3.png" for sample in samples),
    }


def toy_validate(engine: Any) -> dict[str, float]:
    """Figures on fixed data; also disturbs the generators, which must not matter."""
    batch = toy_collate([ToyData().draw(index, 0, 123) for index in range(8)])
    np.random.rand(3)
    torch.rand(3)
    loss = float(engine.infer(batch)["loss"])
    return {"giou": -loss, "loss": loss, "noise": float(torch.rand(()))}


@dataclass
class ToyConfig(EngineConfig):
    """Small and quick settings."""

    epochs: int = 3
    steps_per_epoch: int = 4
    batch_size: int = 3
    grad_accumulation_steps: int = 2
    precision: str = "fp32"
    zero_stage: int = 0
    lr: float = 1e-2
    warmup_steps: int = 2
    workers: int = 0
    device: str = "cpu"
    tensorboard: bool = False
    progress: bool = False
    save_every_steps: int = 2
    lr_multipliers: str = "decoder=0.5"
    noise: float = 0.3


def train_toy(config: ToyConfig, kill_at: int | None = None, **data: Any) -> Any:
    """Train in this process and write the final weights; `kill_at` kills at that file operation of saving."""
    import utils.checkpointing as checkpointing
    from utils.distributed import init_distributed, shutdown
    from utils.engine import Engine

    torch.set_num_threads(1)
    world = init_distributed("cpu")
    operations = arm(checkpointing, kill_at)
    torch.manual_seed(5)
    engine = Engine(ToyModel(config.noise), config, world, ToyData(**data), toy_collate, toy_validate)
    result = engine.run()
    tensors = checkpointing.trainable_tensors(engine.ds.module)
    if world.is_main:
        from safetensors.torch import save_file

        save_file(tensors, Path(config.run_dir) / "final.safetensors")
        (Path(config.run_dir) / "operations.txt").write_text(str(len(operations)))
    shutdown()
    return result


def arm(checkpointing: Any, deadly_one: int | None) -> list[str]:
    """Note every file operation of checkpointing; kill this process with SIGKILL at number `deadly_one`."""
    done: list[str] = []

    def deadly(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(original.__name__)
            if len(done) == deadly_one:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    checkpointing.fsync_path = deadly(checkpointing.fsync_path)
    checkpointing.atomic_write_text = deadly(checkpointing.atomic_write_text)
    checkpointing._dump = deadly(checkpointing._dump)
    checkpointing.os = type("DeadlyOs", (), {"rename": staticmethod(deadly(os.rename)), "walk": os.walk})
    return done


def start(
    config: EngineConfig, ranks: int = 1, job: Callable[..., Any] = train_toy, **arguments: Any
) -> list[Any]:
    """Start `ranks` processes that run `job`, forked from a server with the heavy imports loaded."""
    import multiprocessing

    from utils.distributed import free_port

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.utils.toy_training", "utils.train_lisat_job", "deepspeed"])
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        env = {name: str(value) for name, value in env.items()} | {"MASTER_ADDR": "127.0.0.1"}
        if ranks == 1:
            env = {}
        process = context.Process(target=_child, args=(env, config, job, arguments))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[Any], seconds: float = 120) -> list[int]:
    """Exit codes; processes that outlive `seconds` are killed."""
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _child(env: dict[str, str], config: EngineConfig, job: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(env)
    try:
        job(config, **arguments)
    except (RuntimeError, ValueError) as error:
        Path(config.log_base_dir).mkdir(parents=True, exist_ok=True)
        name = f"{config.exp_name}-error-{env.get('RANK', '0')}.txt"
        (Path(config.log_base_dir) / name).write_text(f"{type(error).__name__}: {error}")
        os._exit(3)
