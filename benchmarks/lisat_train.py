"""One training step (forward and backward, LoRA) on pictures with three questions each: rows packed
behind a shared prefix against a straightforward implementation.

python benchmarks/lisat_train.py           about a minute of processor time; --tiny for seconds
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import BenchmarkConfig, Report, measured, peak_memory  # noqa: E402
from utils.config import parse_config  # noqa: E402

OURS, PLAIN, SAM_ONCE = "ours", "straightforward", "straightforward, SAM once"
TOLERANCE, TARGET = 1e-4, 2.5


def run(config: BenchmarkConfig) -> Report:
    """Measure memory, compare losses and gradients, then time; lines and whether all was equal."""
    import torch

    from benchmarks import baseline, workload
    from model.lora import add_lora, mark_trainable

    torch.set_num_threads(1)
    sizes = workload.tiny() if config.tiny else workload.mid_size()
    work = workload.build(sizes, config.images, config.questions, config.seed)
    model, batch = work.model, work.training_batch()
    add_lora(model, dropout=0.0)  # dropout draws other numbers for other layouts
    mark_trainable(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".lora_B." in name:  # zero at first, which would hide the gradient of lora_A
                torch.nn.init.normal_(parameter, std=0.02)

    def ours() -> dict:
        model.zero_grad()
        losses = model(**batch)
        losses["loss"].backward()
        return losses

    def plain(sam_per_question: bool = True) -> dict:
        model.zero_grad()
        with baseline.eager_attention(model):
            losses = baseline.losses(model, batch, sam_per_question)
            losses["loss"].backward()
        return losses

    def result(path: Callable[[], dict]) -> tuple[dict, torch.Tensor]:
        losses = {name: value.item() for name, value in path().items()}
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()]
        return losses, torch.cat([g.flatten() for g in flat])

    paths = {OURS: ours, PLAIN: plain, SAM_ONCE: lambda: plain(sam_per_question=False)}
    memory = {name: peak_memory(path) for name, path in paths.items()}
    (losses, gradients), lines, equal = result(ours), [], True
    for name in (PLAIN, SAM_ONCE):
        expected_losses, expected = result(paths[name])
        loss = max(abs(losses[k] - value) for k, value in expected_losses.items())
        worst = float((gradients - expected).abs().max())
        relative = float((gradients - expected).norm() / expected.norm())
        lines.append(
            f"{name}: losses differ by {loss:.1e}; gradients ({len(expected)} entries up to "
            f"{float(expected.abs().max()):.1e}) by {worst:.1e}, in norm by {relative:.1e} of it"
        )
        equal = equal and all(x <= TOLERANCE for x in (loss, worst, relative))
    lines.insert(0, "losses " + ", ".join(f"{name} {value:.6f}" for name, value in losses.items()))
    lines += measured(paths, config.repeats, memory)
    return Report([*lines, f"equal within {TOLERANCE:g}: {equal}; aimed at {TARGET:g}x"], equal)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its report; exit code 1 if the paths' results differ."""
    report = run(parse_config(BenchmarkConfig, argv, prog="lisat_train.py"))
    print("\n".join(report.lines))
    sys.exit(0 if report.equal else 1)


if __name__ == "__main__":
    main()
